"""The index of a dataset: one row per record with the place and the checksum of its arrays.

Rows are in the order of the manifest's shards, so a record's number is its row. The file is memory-mapped: a
process pays only for the rows it reads.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pomscale.data.schema import ARRAY_MEMBERS, CLASS_MEMBER, ArrayName

NO_LABEL = -1


def index_dtype(arrays: Sequence[ArrayName]) -> np.dtype:
    """A row of the index of a dataset whose records have these arrays (`Manifest.arrays`).

    `key` is `key_hash`, `label` the class id or NO_LABEL. Offset and length, in bytes, and crc32 are those of the whole
    .npy member in its tar.
    """
    places = [
        (f"{array}_{field}", kind)
        for array in arrays
        for field, kind in (("offset", "<i8"), ("length", "<i4"), ("crc32", "<u4"))
    ]
    return np.dtype([("key", "<u8"), ("shard", "<i4"), ("label", "<i4"), *places])


def key_hash(key: str) -> int:
    """64 bits of a key: tells records apart and joins datasets."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


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


def map_index(path: Path, num_rows: int, dtype: np.dtype) -> np.ndarray:
    """The rows (`index_dtype`) of an index, memory-mapped. OSError, or ValueError if it is not one of `num_rows`."""
    content = np.memmap(path, np.uint8, "r")
    header = npy_header((num_rows,), dtype)
    num_bytes = len(header) + num_rows * dtype.itemsize
    if len(content) != num_bytes or content[: len(header)].tobytes() != header:
        raise ValueError(f"it is no index of {num_rows:,} records")
    return content[len(header) :].view(dtype)


@dataclass(frozen=True, slots=True)
class ScannedShard:
    """What a tar itself says: keys in order, the suffixes of the members of each, and the index rows."""

    keys: list[str]
    suffixes: list[set[str]]
    rows: np.ndarray


def scan_shard(path: Path, shard: int, arrays: Sequence[ArrayName]) -> ScannedShard:
    """Reads a tar from its headers and payloads. In the rows, a missing member has length 0.

    Raises tarfile.ReadError or OSError where the tar is damaged or cut off, ValueError or OverflowError for a class
    that is no number or too large for the index.
    """
    dtype = index_dtype(arrays)
    prefixes = {ARRAY_MEMBERS[array]: array for array in arrays}
    suffixes: dict[str, set[str]] = {}
    rows: dict[str, np.ndarray] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, suffix = split_member_name(member.name)
            if key not in rows:
                suffixes[key] = set()
                rows[key] = np.zeros((), dtype)
                rows[key]["key"], rows[key]["shard"], rows[key]["label"] = key_hash(key), shard, NO_LABEL
            suffixes[key].add(suffix)
            row = rows[key]
            if suffix in prefixes:
                payload = _read(tar, member)
                prefix = prefixes[suffix]
                row[f"{prefix}_offset"] = member.offset_data
                row[f"{prefix}_length"] = member.size
                row[f"{prefix}_crc32"] = zlib.crc32(payload)
            elif suffix == CLASS_MEMBER:
                row["label"] = int(_read(tar, member))
    return ScannedShard(list(rows), list(suffixes.values()), np.array(list(rows.values()), dtype))


def split_member_name(name: str) -> tuple[str, str]:
    """Key and suffix, as WebDataset splits them: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extensions = base.partition(".")
    return folder + slash + stem, dot + extensions


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is not a plain file")
    return stream.read()
