"""Several endless streams become one, in given proportions and in an order that is a pure function of the seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pomscale.base.keyed_random import Stream, keyed_generator

PERIOD = 65_536

# A batch that straddles the border of two periods, read by a few threads.
_CACHED_PERIODS = 3


@dataclass(frozen=True, slots=True)
class _Period:
    """Places `first` to `first + n` of the result. Arrays (n,)."""

    first: int
    streams: np.ndarray  # int32, which stream a place is given to
    indices: np.ndarray  # int64, and which place of that stream it is


class Interleave:
    """Place i of the result is place `index` of stream `stream`; see `places`.

    Stream g with share s_g has given floor(k PERIOD s_g) places, in exact arithmetic, when period k begins. So no share
    is ever rounded, however small: a period's counts vary by one, and so, by a few places, does its length. Inside a
    period a stream's n places lie at random, one in each n-th of it, so that every prefix of the result has each stream
    to about one place. Alone, a stream is passed through. Memory is O(period), finding a place costs the same wherever
    it is. Safe to share between threads.
    """

    def __init__(self, weights: Sequence[Fraction | int], seed: int, subindex: int, period: int = PERIOD) -> None:
        scale = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._total = sum(self._weights)
        self._period = period
        self._seed = seed
        self._subindex = subindex
        self._laid_out = functools.lru_cache(maxsize=_CACHED_PERIODS)(self._lay_out)

    def places(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the result, int64 (b,) -> stream and place in that stream, int64 (b,) each."""
        if len(self._weights) == 1:
            return np.zeros_like(places), places
        streams, indices = np.empty_like(places), np.empty_like(places)
        left = np.arange(len(places))
        while len(left):
            period = self._laid_out(self._period_of(int(places[left].min())))
            offsets = places[left] - period.first
            inside = offsets < len(period.streams)
            here = left[inside]
            streams[here] = period.streams[offsets[inside]]
            indices[here] = period.indices[offsets[inside]]
            left = left[~inside]
        return streams, indices

    def counts(self, num_places: int) -> np.ndarray:
        """How many of the first places of the result each stream has. int64 (streams,)."""
        if len(self._weights) == 1:
            return np.array([num_places])
        number = self._period_of(num_places)
        period = self._laid_out(number)
        begun = np.bincount(period.streams[: num_places - period.first], minlength=len(self._weights))
        return np.array(self._given_before(number)) + begun

    def _given_before(self, period: int) -> list[int]:
        """How many places each stream has before a period."""
        return [period * self._period * weight // self._total for weight in self._weights]

    def _period_of(self, place: int) -> int:
        # Rounding down makes periods begin early, never late, by less than one place per stream.
        number = place // self._period
        while sum(self._given_before(number + 1)) <= place:
            number += 1
        return number

    def _lay_out(self, number: int) -> _Period:
        before, after = self._given_before(number), self._given_before(number + 1)
        counts = np.array(after) - np.array(before)
        streams = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        jitter = keyed_generator(self._seed, Stream.MIXTURE, number, self._subindex).random(len(streams))
        order = np.argsort((ranks + jitter) / counts[streams], kind="stable")
        return _Period(sum(before), streams[order], (np.array(before)[streams] + ranks)[order])
