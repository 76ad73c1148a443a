"""The index of a dataset: one row per record with the place and the checksum of its latents.

Rows are in the order of the manifest's shards, so a record's number is its row. The file is memory-mapped: a
process pays only for the rows it reads.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pomscale.data.schema import CLASS_MEMBER, FLIP_MEMBER, LATENT_MEMBER

# Offset and length, in bytes, and crc32 are those of the whole .npy member in its tar; length 0 = no such member.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("label", "<i4"),
        ("latent_offset", "<i8"),
        ("latent_length", "<i4"),
        ("latent_crc32", "<u4"),
        ("flip_offset", "<i8"),
        ("flip_length", "<i4"),
        ("flip_crc32", "<u4"),
    ]
)

_FIELD_PREFIX = {LATENT_MEMBER: "latent", FLIP_MEMBER: "flip"}


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file. The header depends on shape and dtype alone."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    """The header that `to_npy` writes for arrays of this shape and dtype."""
    stream = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def map_index(path: Path, num_rows: int) -> np.ndarray:
    """The rows (see INDEX_DTYPE) of an index, memory-mapped. OSError, or ValueError if it is not one of `num_rows`."""
    content = np.memmap(path, np.uint8, "r")
    header = npy_header((num_rows,), INDEX_DTYPE)
    num_bytes = len(header) + num_rows * INDEX_DTYPE.itemsize
    if len(content) != num_bytes or content[: len(header)].tobytes() != header:
        raise ValueError(f"it is no index of {num_rows:,} records")
    return content[len(header) :].view(INDEX_DTYPE)


def scan_shard(path: Path, shard: int) -> tuple[dict[str, set[str]], np.ndarray]:
    """Reads a tar from its headers and payloads: keys in order, each with its members' suffixes, and the index rows.

    Raises tarfile.ReadError or OSError where the tar is damaged or cut off, ValueError or OverflowError for a class
    that is no number or too large for the index.
    """
    suffixes: dict[str, set[str]] = {}
    rows: dict[str, np.ndarray] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extensions = name.partition(".")
            key, suffix = folder + slash + stem, dot + extensions
            suffixes.setdefault(key, set()).add(suffix)
            row = rows.setdefault(key, np.zeros((), INDEX_DTYPE))
            row["shard"] = shard
            if suffix in _FIELD_PREFIX:
                payload = _read(tar, member)
                prefix = _FIELD_PREFIX[suffix]
                row[f"{prefix}_offset"] = member.offset_data
                row[f"{prefix}_length"] = member.size
                row[f"{prefix}_crc32"] = zlib.crc32(payload)
            elif suffix == CLASS_MEMBER:
                row["label"] = int(_read(tar, member))
    return suffixes, np.array(list(rows.values()), INDEX_DTYPE)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is not a plain file")
    return stream.read()
