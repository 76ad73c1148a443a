"""Rows of bytes out of several arrays, in one copy that lets other threads run meanwhile.

Slices that Python joins are as fast to copy, but hold its global lock for as long: two reader threads were no faster
than one. torch gathers without the lock, out of one tensor, so there is one over all the memory between the arrays.
What is not in one of them is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# What torch and numpy can count in one array.
_MOST_ELEMENTS = 2**63 - 1


def gather(arrays: Mapping[int, np.ndarray], numbers: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """The bytes from `offsets` (b,) int64 on of the arrays with these `numbers` (b,), b > 0: (b, length) uint8.

    arrays: (n,) uint8 each, contiguous, by a number of at least 0. ValueError if a row is not wholly in its array.
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
    """The same, with a tensor per array and a second copy."""
    rows = np.empty((len(numbers), length), np.uint8)
    for number in np.unique(numbers).tolist():
        here = numbers == number
        rows[here] = gather({number: arrays[number]}, numbers[here], offsets[here], length)
    return rows


class _Rows:
    """What numpy makes an array of, without owning it: overlapping rows, one every `step` bytes."""

    def __init__(self, address: int, shape: tuple[int, int], step: int) -> None:
        read_only = False  # though nobody writes: torch warns of arrays that are
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "strides": (step, 1),
            "data": (address, read_only),
        }
