"""Steps of packed samples: which positions a step takes, and how its samples are dealt to ranks and micro-batches.

A step that begins at position p takes p, p + 1, .. while their tokens fit into the budget. So its end is a pure
function of p and of what decides the order of the samples, and knows nothing of ranks; the state of a run is one
position, from which the same steps follow on any number of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pomscale.data.mixture_order import MixtureOrder

Bins = list[list[np.ndarray]]
"""Rows of a step (k,) int64 of each micro-batch and, in it, of each rank."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """Samples of one step: positions first .. first + n - 1. Arrays (n,) int64: tokens, and number of the shape."""

    first: int
    tokens: np.ndarray
    shapes: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.tokens)


class PackedOrder:
    """Steps to a budget of tokens."""

    def __init__(
        self,
        order: MixtureOrder,
        num_tokens: Callable[[tuple[int, ...]], int],
        global_tokens: int,
        micro_tokens: int | None,
    ) -> None:
        """Lay out steps.

        Args:
            order: Order of the samples, of global batch 1.
            num_tokens: Returns the tokens of a sample of a latent shape, at most those of a micro-batch.
            global_tokens: Most tokens of a step over all ranks.
            micro_tokens: Most tokens of a rank's micro-batch; None = its whole share.
        """
        assert order.global_batch == 1
        self._order = order
        self._tokens = np.array([num_tokens(shape) for shape in order.shapes])
        self._global_tokens, self.micro_tokens = global_tokens, micro_tokens

    def step_at(self, position: int) -> PackedStep:
        """Return the step that begins at a position."""
        most = self._global_tokens // int(self._tokens.min())
        shapes = self._order.shape_numbers(position + np.arange(most, dtype=np.int64))
        tokens = self._tokens[shapes]
        length = int(np.searchsorted(tokens.cumsum(), self._global_tokens, side="right"))
        return PackedStep(position, tokens[:length], shapes[:length])

    def steps(self, position: int) -> Iterator[PackedStep]:
        """Yield the steps from a position on, endlessly."""
        while True:
            step = self.step_at(position)
            yield step
            position += step.num_samples

    def by_shape(self, step: PackedStep, rows: np.ndarray) -> list[np.ndarray]:
        """Return rows (k,) of a step by shape; shapes whose frames have one size are neighbours."""
        numbers = np.unique(step.shapes[rows]).tolist()
        numbers.sort(key=lambda number: (self._order.shapes[number][-2:], self._order.shapes[number]))
        return [rows[step.shapes[rows] == number] for number in numbers]


def deal(tokens: np.ndarray, num_ranks: int, micro_tokens: int | None) -> Bins:
    """Deal samples of so many tokens (n,) to ranks, and each rank's to equally many micro-batches within a budget.

    They go one by one, the largest first, to where the fewest tokens are (Graham 1969, LPT); there are as few
    micro-batches as this needs. With n >= num_ranks none of the first is empty.
    """
    if micro_tokens is None:
        return _as_bins(_balanced(tokens, num_ranks), num_ranks)
    num_micro_batches = -(-int(tokens.sum()) // (num_ranks * micro_tokens))
    while True:
        rows = _balanced(tokens, num_ranks * num_micro_batches)
        if max(int(tokens[of_bin].sum()) for of_bin in rows) <= micro_tokens:
            return _as_bins(rows, num_ranks)
        num_micro_batches += 1


def _balanced(tokens: np.ndarray, num_bins: int) -> list[np.ndarray]:
    """Return the rows of each bin, in ascending order."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for row in np.argsort(-tokens, kind="stable").tolist():
        load, number = loads[0]
        bins[number].append(row)
        heapq.heapreplace(loads, (load + int(tokens[row]), number))
    return [np.array(sorted(rows), np.int64) for rows in bins]


def _as_bins(rows: Sequence[np.ndarray], num_ranks: int) -> Bins:
    return [list(rows[first : first + num_ranks]) for first in range(0, len(rows), num_ranks)]
