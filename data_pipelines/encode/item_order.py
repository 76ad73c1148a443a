"""The order in which the items of a source are dealt to parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data_pipelines.encode.array_files import BLOCK
from pomscale.base.keyed_random import Stream, keyed_generator

# Subindex of Stream.DATASET for the order of items; `show` uses 2.
_ITEM_ORDER = 1

# Rounds of the network that permutes items.
_NUM_ROUNDS = 8
_MASK = 2**64 - 1


class Order(Protocol):
    """A permutation of the items."""

    def item(self, position: int) -> int:
        """Return the number of the item at a position. IndexError outside of the items."""


class ItemOrder:
    """A permutation of range(num_items) that depends on the seed alone; the identity if not `shuffled`.

    Nobody has to store it: memory and time per call do not grow with the number of items. It is a Feistel network over
    pairs (left, right) in Z_a x Z_b with a b just above num_items, and cycle walking for the few numbers beyond it
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5).
    """

    def __init__(self, num_items: int, seed: int, shuffled: bool) -> None:
        self._num_items = num_items
        self._shuffled = shuffled
        self._a = math.isqrt(max(num_items - 1, 0)) + 1
        self._b = -(-num_items // self._a)
        generator = keyed_generator(seed, Stream.DATASET, 0, _ITEM_ORDER)
        self._keys = [int(key) for key in generator.integers(0, _MASK, _NUM_ROUNDS, dtype="u8", endpoint=True)]

    def item(self, position: int) -> int:
        """Return the number of the item at a position. IndexError outside range(num_items)."""
        if not 0 <= position < self._num_items:
            raise IndexError(f"position {position} of {self._num_items} items")
        if not self._shuffled:
            return position
        item = self._encipher(position)
        while item >= self._num_items:  # a bijection of the larger domain comes back below num_items in the end
            item = self._encipher(item)
        return item

    def _encipher(self, number: int) -> int:
        """Apply a bijection of range(a b): each half in turn is shifted by a function of the other half only."""
        left, right = divmod(number, self._b)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(key, left)) % self._b
            else:
                left = (left + _mix(key, right)) % self._a
        return left * self._b + right


def _mix(key: int, value: int) -> int:
    """Return 64 bits that each depend on every bit of both: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = (key + value * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


# -- ranges of files ---------------------------------------------------------------------------------------------------


class FileOrder:
    """An order that was computed once and lies on disk (`file_by_file`)."""

    def __init__(self, items: np.ndarray) -> None:
        self._items = items

    def item(self, position: int) -> int:
        """Return the number of the item at a position. IndexError outside of the items."""
        if not 0 <= position < len(self._items):
            raise IndexError(f"position {position} of {len(self._items)} items")
        return int(self._items[position])


def file_by_file(files: np.ndarray, starts: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield the numbers of all items, in blocks: files in a random order keyed by the seed, each by its items' starts.

    So the ranges of a file are neighbours and are decoded in one pass, wherever their rows are in the table. Two files
    whose hashes agree in their upper bits may be interleaved, which costs a pass and changes nothing else.

    Args:
        files: Hashes of the items' files, (n,) uint64, memory-mapped; they are overwritten.
        starts: Starts of the items in their files, (n,) int64.
        seed: Seed of the order of the files.
    """
    num_bits = max(1, (len(files) - 1).bit_length())
    low = np.uint64(2**num_bits - 1)
    key = keyed_generator(seed, Stream.DATASET, 0, _ITEM_ORDER).integers(0, _MASK, dtype="u8", endpoint=True)
    for begin in range(0, len(files), BLOCK):
        block = files[begin : begin + BLOCK]
        # The upper bits of a hash, and the item's number: one array is sorted in place, and not three in memory.
        block[:] = (_mixed(block ^ key) & ~low) | np.arange(begin, begin + len(block), dtype=np.uint64)
    files.sort()
    begin = 0
    while begin < len(files):
        end = min(begin + BLOCK, len(files))
        while end < len(files) and files[end] >> num_bits == files[end - 1] >> num_bits:
            end += 1
        block = files[begin:end]
        items = (block & low).astype(np.int64)
        yield items[np.lexsort((items, starts[items], block >> np.uint64(num_bits)))]
        begin = end


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return 64 bits for each of the values (uint64), which depend on every bit of it, as `_mix` does."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
