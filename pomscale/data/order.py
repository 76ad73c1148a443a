"""The sample order of records of one shape: a record for each position.

It is a pure function of (seed, position, shard sizes, window), so a run's whole reading state is one number, whatever
the ranks, threads and micro-batches. In each epoch the shards are permuted and laid end to end, the result is cut into
windows of `window` records, and each window is permuted. A window holds few shards, so a parallel file system sees
large neighbouring reads; a window of at least the dataset is a full shuffle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from pomscale.base.keyed_random import Stream, keyed_generator

# A batch that straddles a window border, read by a few threads, touches this many windows at a time.
_CACHED_WINDOWS = 4


def groups(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Yield each number that is in `numbers` (b,), b > 0, and an index of the rows that have it."""
    if (numbers == numbers[0]).all():  # true of nearly every batch, so it should cost nearly nothing
        yield int(numbers[0]), slice(None)
        return
    for number in np.unique(numbers).tolist():
        yield number, numbers == number


class SampleOrder:
    """Positions count samples from the start of training and never wrap: epoch = position // num_records.

    There must be a record. Memory is O(window + number of shards). Safe to share between threads. Orders of different
    `component` are independent of each other.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int, component: int = 0) -> None:
        self.num_records = sum(shard_sizes)
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._first_record = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._first_key = component << 32  # an epoch never has as many windows
        self._window = min(window, self.num_records)
        self._windows_per_epoch = -(-self.num_records // self._window)
        self._shards = functools.lru_cache(maxsize=2)(self._permute_shards)
        self._permutation = functools.lru_cache(maxsize=_CACHED_WINDOWS)(self._permute_window)

    def records(self, positions: np.ndarray) -> np.ndarray:
        """Return the record number at each global position, int64 (b,) each."""
        records = np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.num_records)
        windows, ranks_in_window = np.divmod(offsets, self._window)
        numbers = epochs * self._windows_per_epoch + windows
        for number, here in groups(numbers):
            epoch, window = divmod(number, self._windows_per_epoch)
            shards, ends = self._shards(epoch)
            ranks = window * self._window + self._permutation(epoch, window)[ranks_in_window[here]]
            slots = np.searchsorted(ends, ranks, side="right")
            starts = ends[slots] - self._sizes[shards[slots]]
            records[here] = self._first_record[shards[slots]] + ranks - starts
        return records

    def window_at(self, position: int) -> int:
        """Return the window of a position, counted from the start of training."""
        epoch, offset = divmod(position, self.num_records)
        return epoch * self._windows_per_epoch + offset // self._window

    def window_shards(self, number: int) -> list[int]:
        """Return the shards that have records of a window."""
        epoch, window = divmod(number, self._windows_per_epoch)
        begin = window * self._window
        shards, ends = self._shards(epoch)
        first = np.searchsorted(ends, begin, side="right")
        last = np.searchsorted(ends, min(begin + self._window, self.num_records) - 1, side="right")
        return shards[first : last + 1].tolist()

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of an epoch, and where each ends when they are laid end to end."""
        generator = keyed_generator(self._seed, Stream.SHARD_ORDER, epoch, self._first_key)
        shards = generator.permutation(len(self._sizes))
        return shards, np.cumsum(self._sizes[shards])

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        generator = keyed_generator(self._seed, Stream.WINDOW_ORDER, epoch, self._first_key + window)
        return generator.permutation(min(self._window, self.num_records - window * self._window))
