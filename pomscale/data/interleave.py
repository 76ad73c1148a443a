"""Several endless streams become one, in given proportions and in an order that is a pure function of the seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pomscale.keyed_random import Stream, keyed_generator

PERIOD = 65_536

# A batch that straddles the border of two periods, read by a few threads.
_CACHED_PERIODS = 3


@dataclass(frozen=True, slots=True)
class _Period:
    streams: np.ndarray  # (period,) which stream each place of the period is given to
    ranks: np.ndarray  # (period,) how many places before it in the period are given to the same stream


class Interleave:
    """Place i of the result is place `index` of stream `stream`; see `places`.

    Weights are rounded to whole places per period, at least one each, so that every period gives each stream exactly
    its places; within a period they are shuffled. Alone, a stream is passed through. Memory is O(period), finding a
    place costs the same wherever it is. Safe to share between threads.
    """

    def __init__(self, weights: Sequence[float], seed: int, subindex: int, period: int = PERIOD) -> None:
        self.places_per_period = _apportion(np.asarray(weights, np.float64), period)
        self._period = period
        self._seed = seed
        self._subindex = subindex
        self._shuffled = functools.lru_cache(maxsize=_CACHED_PERIODS)(self._shuffle)

    def places(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the result, int64 (b,) -> stream and place in that stream, int64 (b,) each."""
        if len(self.places_per_period) == 1:
            return np.zeros_like(places), places
        streams, indices = np.empty_like(places), np.empty_like(places)
        periods, offsets = np.divmod(places, self._period)
        for number in np.unique(periods).tolist():
            here = periods == number
            period = self._shuffled(number)
            streams[here] = period.streams[offsets[here]]
            indices[here] = number * self.places_per_period[streams[here]] + period.ranks[offsets[here]]
        return streams, indices

    def counts(self, num_places: int) -> np.ndarray:
        """How many of the first places of the result each stream has. int64 (streams,)."""
        if len(self.places_per_period) == 1:
            return np.array([num_places])
        number, rest = divmod(num_places, self._period)
        begun = np.bincount(self._shuffled(number).streams[:rest], minlength=len(self.places_per_period))
        return number * self.places_per_period + begun

    def _shuffle(self, number: int) -> _Period:
        generator = keyed_generator(self._seed, Stream.MIXTURE, number, self._subindex)
        num_streams = len(self.places_per_period)
        streams = generator.permutation(np.repeat(np.arange(num_streams, dtype=np.int32), self.places_per_period))
        ranks = np.empty(self._period, np.int32)
        ranks[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(n) for n in self.places_per_period])
        return _Period(streams, ranks)


def _apportion(weights: np.ndarray, period: int) -> np.ndarray:
    """Whole numbers, at least 1, in proportion to the weights, that add up to `period`: by largest remainders."""
    assert len(weights) <= period
    exact = weights / weights.sum() * period
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while missing := period - counts.sum():
        if missing > 0:
            counts[np.argmax(exact - counts)] += 1
        else:
            counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts
