"""The state from which clips can be continued, as one safetensors file that is checked when it is read back.

Metadata of the file: "format", "format_version", "pomscale" (the version that wrote it), "meta" (JSON) and "crc32" (of
meta and of all tensors, in the order of their names).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pomscale import __version__
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write

_FORMAT, _FORMAT_VERSION = "pomscale-clip-state", "2"
_READ_VERSIONS = ("1", "2")
"""Version 1 knows of the options of sampling only the sampler, the steps and the guidance."""


def write_clip_state(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `path` as a whole, or leave it as it was. Raise PomscaleError if the disk is full.

    `meta` must be JSON.
    """
    # Copies: safetensors refuses tensors that share memory, as key and value of an attention layer may.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps(meta)
    content = save(
        own,
        {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "pomscale": __version__,
            "meta": text,
            "crc32": str(_crc32(text, own)),
        },
    )
    with atomic_write(path) as stream:
        stream.write(content)


def read_clip_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return meta and tensors (on the CPU) as they were written. Raise InputError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: safetensors gives mappings of the file; what is written into it later shows in the tensors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: there is no such file; give the file that the state of clips was saved to"
        ) from error
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}): no state of clips, or a part of one; copy or save it again"
        ) from error
    if header.get("format") != _FORMAT:
        raise InputError(f"{path}: holds no state of clips; give a file that one was saved to")
    if header["format_version"] not in _READ_VERSIONS:
        raise InputError(
            f"{path}: format version {header['format_version']}, this pomscale reads {' and '.join(_READ_VERSIONS)}; "
            f"use pomscale {header['pomscale']}"
        )
    if header.get("crc32") != str(_crc32(header["meta"], tensors)):
        raise InputError(f"{path}: damaged; copy it again, or begin the clips again")
    meta: dict[str, Any] = json.loads(header["meta"])
    return meta, tensors


def _crc32(text: str, tensors: Mapping[str, Tensor]) -> int:
    crc32 = isal_zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc32 = isal_zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc32)
    return crc32
