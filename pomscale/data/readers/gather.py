"""Gather rows of bytes from several arrays, in one copy that lets other threads run meanwhile.

Slices that Python joins are as fast to copy, but hold its global lock for as long: two reader threads were no faster
than one. torch gathers without the lock, from one tensor, so this module makes a tensor over all the memory between the
arrays. Memory outside of the arrays is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# Most elements that torch and numpy can count in one array.
_MOST_ELEMENTS = 2**63 - 1


def gather(arrays: Mapping[int, np.ndarray], numbers: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return rows of bytes, (b, length) uint8. Raises ValueError if a row is not wholly in its array.

    Args:
        arrays: Arrays (n,) uint8, contiguous, by a number of at least 0.
        numbers: Number of each row's array, (b,), b > 0.
        offsets: Offset of each row in its array, (b,) int64.
        length: Bytes of a row.
    """
    addresses, sizes = (np.zeros(max(arrays) + 1, np.int64) for _ in range(2))
    for number, array in arrays.items():
        addresses[number], sizes[number] = array.__array_interface__["data"][0], len(array)
    if (offsets < 0).any() or (offsets > sizes[numbers] - length).any():
        raise ValueError(f"{length} bytes from there on are not in the array")
    starts = addresses[numbers] + offsets
    first = int(starts.min())
    starts -= first
    # In steps as large as what the starts have in common: torch counts the elements of all rows that there could be.
    shared = int(np.bitwise_or.reduce(starts))
    step = max(shared & -shared, 1)
    num_rows = int(starts.max()) // step + 1
    if num_rows * length > _MOST_ELEMENTS:  # one array on the heap, another in a mapping, far above it
        return _one_by_one(arrays, numbers, offsets, length)
    rows = np.asarray(_Rows(first, (num_rows, length), step))
    return torch.from_numpy(rows).index_select(0, torch.from_numpy(starts // step)).numpy()


def _one_by_one(arrays: Mapping[int, np.ndarray], numbers: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return the same as `gather`, with a tensor per array and a second copy."""
    rows = np.empty((len(numbers), length), np.uint8)
    for number in np.unique(numbers).tolist():
        here = numbers == number
        rows[here] = gather({number: arrays[number]}, numbers[here], offsets[here], length)
    return rows


class _Rows:
    """Memory that numpy uses without owning it: overlapping rows, one every `step` bytes."""

    def __init__(self, address: int, shape: tuple[int, int], step: int) -> None:
        read_only = False  # though nobody writes: torch warns of arrays that are
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "strides": (step, 1),
            "data": (address, read_only),
        }
