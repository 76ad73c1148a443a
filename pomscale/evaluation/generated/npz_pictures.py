"""Pictures in an npz file: arr_0 as ADM's scripts write it, or images as `pomscale sample --npz` does."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.picture_sets import Batch, checked_count, spread

PIXELS, LABELS = ("arr_0", "images"), ("arr_1", "classes", "labels")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_PIECE = 1 << 22


class NpzPictures:
    """Pictures (n, h, w, c) or (n, h, w) uint8, read row by row: the array may be larger than the memory."""

    has_captions = False
    frames = None
    fps = None
    crop = None

    def __init__(self, path: Path, *, num: int | None = None) -> None:
        """Open the file. InputError if it has no such array of bytes, or fewer than `num` pictures."""
        self.name = str(path)
        self._path = path
        self._stream, self._begin, self._shape = _open_array(path)
        height, width, *channels = self._shape[1:]
        self.num_channels = channels[0] if channels else 1
        self.size: tuple[int, ...] = (height, width)
        total = self._shape[0]
        self.num_pictures = checked_count(self.name, num, total)
        self._labels = _read_labels(path, total)

    def identity(self) -> dict[str, Any]:
        """Return the settings, size and time of the file, and the hash of its labels."""
        status = self._path.stat()
        labels = None if self._labels is None else hashlib.sha256(self._labels.tobytes()).hexdigest()
        return {**self.settings(), "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "label_hash": labels}

    def settings(self) -> dict[str, Any]:
        return {"kind": "npz", "path": self.name, "count": self.num_pictures, "of": self._shape[0]}

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures, as they are stored."""
        for first in range(begin, end, batch):
            numbers = list(range(first, min(first + batch, end)))
            rows = [self._row(number) for number in numbers]
            pixels = np.stack([self._read(row) for row in rows]).reshape(len(rows), *self.size, self.num_channels)
            labels = None if self._labels is None else [int(self._labels[row]) for row in rows]
            yield Batch(numbers, torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), labels)

    def _row(self, number: int) -> int:
        return spread(number, self.num_pictures, self._shape[0])

    def _read(self, row: int) -> np.ndarray:
        num_bytes = int(np.prod(self._shape[1:]))
        self._stream.seek(self._begin + row * num_bytes)
        content = self._stream.read(num_bytes)
        if len(content) != num_bytes:
            raise InputError(f"{self._path}: ends before its last picture; copy it again")
        return np.frombuffer(content, np.uint8)


def array_names(path: Path) -> set[str]:
    """Return the names of the arrays in an npz file. InputError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as an npz file: {error}") from error


def _open_array(path: Path) -> tuple[BinaryIO, int, tuple[int, ...]]:
    """Return a stream of an array's bytes, the position of the first value in it, and the shape of the array."""
    present = array_names(path)
    name = next((name for name in PIXELS if name in present), None)
    if name is None:
        raise InputError(
            f"{path}: has no pictures: arrays {', '.join(sorted(present)) or 'none'}, and pictures are called "
            f"{' or '.join(PIXELS)}"
        )
    try:
        stream, begin = _uncompressed(path, f"{name}.npy")
        stream.seek(begin)
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](stream)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise InputError(f"{path}: {name} cannot be read: {error}; copy the file again") from error
    is_picture = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if dtype != np.uint8 or not is_picture or is_fortran or 0 in shape:
        raise InputError(
            f"{path}: {name} is {dtype} of shape {shape}, and pictures are uint8 (n, height, width, 1 or 3); write "
            f"bytes from 0 to 255, channels last"
        )
    return stream, stream.tell(), shape


def _uncompressed(path: Path, member: str) -> tuple[BinaryIO, int]:
    """Return a stream that has the bytes of a member as they are, and where they begin.

    np.savez does not compress: the stream is then the file itself. Else the member is written to a file without a name,
    which goes with this process.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type == zipfile.ZIP_STORED:
            stream = path.open("rb")
            stream.seek(info.header_offset)
            *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
            return stream, info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        copy = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the set
        with archive.open(info) as content:
            while piece := content.read(_PIECE):
                copy.write(piece)
        return copy, 0


def _read_labels(path: Path, total: int) -> np.ndarray | None:
    """Return class ids (n,), or None if the file has none. InputError if they are not one number per picture."""
    name = next((name for name in LABELS if name in array_names(path)), None)
    if name is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels: np.ndarray = arrays[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {name} cannot be read: {error}; copy the file again") from error
    if labels.shape != (total,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: {name} is {labels.dtype} of shape {labels.shape}, not one class id per picture")
    return labels
