"""Items that have the key of an earlier item, found without holding the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipelines.encode.array_files import BLOCK, copy_on_disk


def find_duplicates(keys: np.ndarray, key_of: Callable[[int], str], folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the items with the key of an earlier item, in order, each with the first item that has it.

    The hashes are sorted in a file in `folder`. Only where a hash is there twice are keys compared.
    """
    scratch = copy_on_disk(keys, folder)
    scratch.sort()
    count = _keep_repeated(scratch)
    if count:
        # Each occurred at least twice, so there is room for as many numbers behind them.
        firsts = scratch[count : 2 * count].view(np.int64)
        yield from _compare_keys(keys, key_of, scratch[:count], firsts)


def _keep_repeated(values: np.ndarray) -> int:
    """Move the repeated values of a sorted array to its front, once each and sorted. Return how many there are."""
    count = 0
    for begin in range(0, len(values) - 1, BLOCK):
        block = values[begin : begin + BLOCK + 1]
        again = np.unique(block[1:][block[1:] == block[:-1]])
        if count and len(again) and values[count - 1] == again[0]:
            again = again[1:]
        values[count : count + len(again)] = again
        count += len(again)
    return count


def _compare_keys(
    keys: np.ndarray, key_of: Callable[[int], str], repeated: np.ndarray, firsts: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield items whose key an earlier item has, among those whose hash is in `repeated`.

    `firsts`, int64 as long as `repeated`, is scratch space for the first item of each hash.
    """
    firsts[:] = -1
    collided: dict[str, int] = {}  # first item of a key whose hash is that of another key: hardly ever any
    for begin in range(0, len(keys), BLOCK):
        block = keys[begin : begin + BLOCK]
        groups = np.minimum(np.searchsorted(repeated, block), len(repeated) - 1)
        for i in np.flatnonzero(repeated[groups] == block).tolist():
            item, group = begin + i, groups[i]
            other = int(firsts[group])
            if other < 0:
                firsts[group] = item
                continue
            key = key_of(item)
            if key_of(other) != key:
                other = collided.setdefault(key, item)
            if other != item:
                yield item, other
