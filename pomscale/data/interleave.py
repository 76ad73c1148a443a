"""Interleave several endless streams in given proportions, in an order that is a pure function of the seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pomscale.base.keyed_random import Stream, keyed_generator

PERIOD = 65_536

# Enough for a batch that straddles the border of two periods, read by a few threads.
_CACHED_PERIODS = 3


@dataclass(frozen=True, slots=True)
class _Period:
    """Layout of the positions `first` to `first + n` of the result. Arrays (n,)."""

    first: int
    streams: np.ndarray  # int32, the stream that fills a position
    indices: np.ndarray  # int64, the index of its element in that stream


class Interleave:
    """Position i of the result has element `index` of stream `stream`; see `locate`.

    Stream g with share s_g has filled floor(k PERIOD s_g) positions, in exact arithmetic, when period k begins. So no
    share is ever rounded, however small: a period's counts vary by one, and its length by a few positions. Inside a
    period the n elements of a stream lie at random, one in each n-th of it, so that every prefix of the result has each
    share to about one element. A stream alone is passed through. Memory is O(period), and every position costs the
    same. Safe to share between threads.
    """

    def __init__(self, weights: Sequence[Fraction | int], seed: int, subindex: int, period: int = PERIOD) -> None:
        scale = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._total = sum(self._weights)
        self._period = period
        self._seed = seed
        self._subindex = subindex
        self._laid_out = functools.lru_cache(maxsize=_CACHED_PERIODS)(self._lay_out)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return stream and index in that stream, int64 (b,) each, of positions of the result, int64 (b,)."""
        if len(self._weights) == 1:
            return np.zeros_like(positions), positions
        streams, indices = np.empty_like(positions), np.empty_like(positions)
        left = np.arange(len(positions))
        while len(left):
            period = self._laid_out(self._period_of(int(positions[left].min())))
            offsets = positions[left] - period.first
            inside = offsets < len(period.streams)
            here = left[inside]
            streams[here] = period.streams[offsets[inside]]
            indices[here] = period.indices[offsets[inside]]
            left = left[~inside]
        return streams, indices

    def counts(self, num_positions: int) -> np.ndarray:
        """Return how many of the first positions of the result each stream has filled, int64 (streams,)."""
        if len(self._weights) == 1:
            return np.array([num_positions])
        number = self._period_of(num_positions)
        period = self._laid_out(number)
        begun = np.bincount(period.streams[: num_positions - period.first], minlength=len(self._weights))
        return np.array(self._given_before(number)) + begun

    def _given_before(self, period: int) -> list[int]:
        """Return how many positions each stream has filled before a period."""
        return [period * self._period * weight // self._total for weight in self._weights]

    def _period_of(self, position: int) -> int:
        # Rounding down makes periods begin early, never late, by less than one position per stream.
        number = position // self._period
        while sum(self._given_before(number + 1)) <= position:
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
