"""The index of a dataset: one row per record with offset, length and checksum of its arrays.

Rows are in the order of the manifest's shards, so a record's number is its row. The file is memory-mapped: a
process pays only for the rows it reads.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pomscale.shards.schema import ArrayName

NO_LABEL = -1


def index_dtype(arrays: Sequence[ArrayName]) -> np.dtype:
    """Return the dtype of an index row for records with these arrays (`Manifest.arrays`).

    `key` is `key_hash`, `label` the class id or NO_LABEL. Offset and length, in bytes, and crc32 are those of the whole
    .npy member in its tar, and 0 where a record has no such array; record_crc32 is that of all the record's headers,
    members and padding.
    """
    fields = [
        (f"{array}_{field}", kind)
        for array in arrays
        for field, kind in (("offset", "<i8"), ("length", "<i4"), ("crc32", "<u4"))
    ]
    return np.dtype([("key", "<u8"), ("shard", "<i4"), ("label", "<i4"), *fields, ("record_crc32", "<u4")])


def key_hash(key: str) -> int:
    """Return a 64-bit hash of a key, which identifies a record and joins datasets."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def to_npy(array: np.ndarray) -> bytes:
    """Return the bytes of a .npy file, whose header depends on shape and dtype alone."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    """Return the header that `to_npy` writes for arrays of this shape and dtype."""
    stream = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def map_index(path: Path, num_rows: int, dtype: np.dtype, row_shape: tuple[int, ...] = ()) -> np.ndarray:
    """Return the rows of an index, or of another table of fixed rows, memory-mapped: (num_rows, *row_shape).

    Raises OSError, or ValueError if it is no such file of `num_rows`. np.load is not used, since NumPy's parser raises
    errors of many kinds for a damaged header (tokenize's, EOFError).
    """
    content = np.memmap(path, np.uint8, "r")
    header = npy_header((num_rows, *row_shape), dtype)
    num_bytes = len(header) + num_rows * math.prod(row_shape) * dtype.itemsize
    if len(content) != num_bytes or content[: len(header)].tobytes() != header:
        raise ValueError(f"it is no index of {num_rows:,} records")
    return content[len(header) :].view(dtype).reshape(num_rows, *row_shape)


def split_member_name(name: str) -> tuple[str, str]:
    """Return key and suffix of a member, split as WebDataset does: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extensions = base.partition(".")
    return folder + slash + stem, dot + extensions
