"""safetensors files, written tensor by tensor and read back with checksums.

The safetensors package can only write tensors that are all in memory. The format is simple enough to write as a stream:
the length of a JSON header (8 bytes, little-endian), the header, then the tensors' bytes, in the header's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(
    path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor], dtype: torch.dtype
) -> dict[str, int]:
    """Write `tensors` as fp32 or bf16, holding one of them at a time.

    Args:
        path: The file to write.
        shapes: Shapes by name.
        tensors: Tensors in the order of `shapes`.
        dtype: torch.float32 or torch.bfloat16.

    Returns:
        The CRC-32 of each tensor's bytes, by name.

    Raises:
        PomscaleError: The disk is full.
    """
    header = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    crc32s = {}
    with atomic_write(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == torch.Size(shape), name
            content = _bytes(tensor.to(dtype))
            crc32s[name] = isal_zlib.crc32(content)
            stream.write(content)
    return crc32s


def read_safetensors(path: Path, tensors: Mapping[str, Tensor], crc32s: Mapping[str, int]) -> None:
    """Fill `tensors` of any dtype in place, by name. Raise InputError if the file is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, target in tensors.items():
                # A copy: safetensors gives a mapping of the file; what is written into it later shows in the tensor.
                tensor = file.get_tensor(name).clone()
                if tensor.shape != target.shape or isal_zlib.crc32(_bytes(tensor)) != crc32s.get(name):
                    raise InputError(f"{path}: {name} is damaged; copy the file again")
                target.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}; copy the file again") from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
