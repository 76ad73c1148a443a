"""Find equal keys among any number of records, in constant memory: hashes of keys, sorted piece by piece on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from pomscale.base.errors import PomscaleError

KEY_ROW = np.dtype([("key", "<u8"), ("row", "<i8")])

_ROWS_AT_ONCE = 1 << 22  # 64 MiB


def sorted_buckets(columns: Sequence[np.ndarray], rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[list[np.ndarray]]:
    """Cut the range of hashes into buckets and yield, bucket by bucket, each column's keys with their rows (KEY_ROW).

    Buckets come in ascending order, each sorted by key, then row. Hashes are spread evenly, so the buckets of all
    columns have about `rows_at_once` rows together. Larger columns are dealt to buckets in a temporary file of 16 bytes
    per key (in TMPDIR).

    Args:
        columns: Arrays (n,) uint64 of any stride, e.g. a field of a memory-mapped index.
        rows_at_once: Rows that are in memory at once.
    """
    num_rows = sum(map(len, columns))
    num_bits = max(0, -(-num_rows // rows_at_once) - 1).bit_length()
    with ExitStack() as files:
        dealt = [_Dealt(column, num_bits, rows_at_once, files) for column in columns]
        for bucket in range(1 << num_bits):
            # Dealing kept the order of rows, and so does a stable sort.
            rows = [one.bucket(bucket) for one in dealt]
            yield [mine[np.argsort(mine["key"], kind="stable")] for mine in rows]


def equal_keys(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows with equal keys: a row, and the next one that has its key."""
    for (bucket,) in sorted_buckets([column]):
        for i in np.flatnonzero(bucket["key"][1:] == bucket["key"][:-1]):
            yield int(bucket["row"][i]), int(bucket["row"][i + 1])


class _Dealt:
    """A column's keys and rows, bucket after bucket."""

    def __init__(self, column: np.ndarray, num_bits: int, rows_at_once: int, files: ExitStack) -> None:
        self._shift = np.uint64(64 - num_bits)
        num_buckets = 1 << num_bits
        if num_buckets == 1 or not len(column):
            self._rows = _with_rows(column, 0)
            self._ends = np.full(num_buckets, len(column))
            return
        blocks = range(0, len(column), rows_at_once)
        counts = np.zeros(num_buckets, np.int64)
        for begin in blocks:
            counts += np.bincount(self._buckets_of(column[begin : begin + rows_at_once]), minlength=num_buckets)
        self._ends = np.cumsum(counts)
        self._rows = _temporary_array(len(column), files)
        free = self._ends - counts
        for begin in blocks:
            rows = _with_rows(column[begin : begin + rows_at_once], begin)
            buckets = self._buckets_of(rows["key"])
            rows = rows[np.argsort(buckets, kind="stable")]
            mine = np.bincount(buckets, minlength=num_buckets)
            for bucket, piece in enumerate(np.split(rows, np.cumsum(mine)[:-1])):
                self._rows[free[bucket] : free[bucket] + len(piece)] = piece
            free += mine

    def bucket(self, number: int) -> np.ndarray:
        return self._rows[self._ends[number - 1] if number else 0 : self._ends[number]]

    def _buckets_of(self, keys: np.ndarray) -> np.ndarray:
        return (keys >> self._shift).astype(np.int64)


def _with_rows(keys: np.ndarray, first_row: int) -> np.ndarray:
    rows = np.empty(len(keys), KEY_ROW)
    rows["key"], rows["row"] = keys, np.arange(first_row, first_row + len(keys))
    return rows


def _temporary_array(num_rows: int, files: ExitStack) -> np.ndarray:
    try:
        file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  closed with the stack
        # Without its blocks, a disk that fills up would kill the process where it writes to the map.
        os.posix_fallocate(file.fileno(), 0, num_rows * KEY_ROW.itemsize)
    except OSError as error:
        raise PomscaleError(
            f"{tempfile.gettempdir()}: no room to sort {num_rows:,} keys: {error}; set TMPDIR to a larger disk"
        ) from error
    return np.memmap(file, KEY_ROW, "r+", shape=(num_rows,))
