"""Check the CRC-32s of many rows of equal length with a few calls.

One call per row would release and take Python's global lock every few microseconds, and reader threads would spend
their time on that. isal's CRC-32 is that of zlib at ten times the speed: on every record, every time, it
then costs less than copying the record.
"""

from __future__ import annotations

import functools

import numpy as np
from isal import isal_zlib

# As many as an image batch has; combining their sums costs next to nothing.
_ROWS_AT_ONCE = 256


def wrong_rows(content: np.ndarray, crc32s: np.ndarray) -> list[int]:
    """Return the rows of `content` (b, num_bytes) uint8, contiguous, whose CRC-32 differs from `crc32s` (b,) uint32."""
    wrong = []
    for begin in range(0, len(content), _ROWS_AT_ONCE):
        rows, expected = content[begin : begin + _ROWS_AT_ONCE], crc32s[begin : begin + _ROWS_AT_ONCE]
        if isal_zlib.crc32(rows.reshape(-1).data) != _of_concatenation(expected, content.shape[1]):
            is_wrong = np.array([isal_zlib.crc32(row) for row in rows], np.uint32) != expected
            wrong += (begin + np.flatnonzero(is_wrong)).tolist()
    return wrong


def _of_concatenation(crc32s: np.ndarray, num_bytes: int) -> int:
    """Return the CRC-32 of rows laid end to end: crc(A B) = M crc(A) + crc(B), where M shifts past the bytes of B."""
    powers = _powers(num_bytes)[_ROWS_AT_ONCE - len(crc32s) :]
    return int(np.bitwise_xor.reduce(_times(powers, crc32s[:, None]), axis=None))


def _times(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the terms of matrices over GF(2), by columns (..., 32) uint32, times vectors of bits (..., 1)."""
    bits = values >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return columns * bits


@functools.lru_cache(maxsize=64)
def _powers(num_bytes: int) -> np.ndarray:
    """Return the columns of M**(_ROWS_AT_ONCE - 1), ..., M, 1 for rows of `num_bytes`: (_ROWS_AT_ONCE, 32) uint32."""
    zeros = bytes(num_bytes)
    nothing = isal_zlib.crc32(zeros)  # CRC-32 is linear but for this constant
    past_a_row = np.array([isal_zlib.crc32(zeros, 1 << bit) ^ nothing for bit in range(32)], np.uint32)
    powers = [np.uint32(1) << np.arange(32, dtype=np.uint32)]
    while len(powers) < _ROWS_AT_ONCE:
        powers.append(np.bitwise_xor.reduce(_times(past_a_row, powers[-1][:, None]), axis=1))
    return np.stack(powers[::-1])
