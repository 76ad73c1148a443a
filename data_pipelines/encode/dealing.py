"""In which order the items of a source are dealt to parts: a keyed permutation that nobody has to store."""

from __future__ import annotations

import math

from pomscale.base.keyed_random import Stream, keyed_generator

# Subindex of Stream.DATASET; `show` uses 2.
_ITEM_ORDER = 1

_NUM_ROUNDS = 8
_MASK = 2**64 - 1


class Dealing:
    """A permutation of range(num_items) that depends on the seed alone; the identity if not `shuffled`.

    Memory and time per call do not grow with the number of items: a Feistel network over pairs (left, right) in
    Z_a x Z_b with a b just above num_items, and cycle walking for the few numbers beyond it (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", sections 4 and 5).
    """

    def __init__(self, num_items: int, seed: int, shuffled: bool) -> None:
        self._num_items = num_items
        self._shuffled = shuffled
        self._a = math.isqrt(max(num_items - 1, 0)) + 1
        self._b = -(-num_items // self._a)
        generator = keyed_generator(seed, Stream.DATASET, 0, _ITEM_ORDER)
        self._keys = [int(key) for key in generator.integers(0, _MASK, _NUM_ROUNDS, dtype="u8", endpoint=True)]

    def item(self, place: int) -> int:
        """Number of the item that is dealt to a place. IndexError outside range(num_items)."""
        if not 0 <= place < self._num_items:
            raise IndexError(f"place {place} of {self._num_items} items")
        if not self._shuffled:
            return place
        item = self._encipher(place)
        while item >= self._num_items:  # a bijection of the larger domain comes back below num_items in the end
            item = self._encipher(item)
        return item

    def _encipher(self, number: int) -> int:
        """A bijection of range(a b): each half in turn is shifted by what depends on the other half only."""
        left, right = divmod(number, self._b)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(key, left)) % self._b
            else:
                left = (left + _mix(key, right)) % self._a
        return left * self._b + right


def _mix(key: int, value: int) -> int:
    """64 bits in which every bit depends on every bit of both: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = (key + value * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
