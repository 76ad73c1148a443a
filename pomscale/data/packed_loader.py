"""Load the packed micro-batches of one rank: samples of any shapes, to a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pomscale.data.loader import MicroBatch, ReadAhead, ReaderThreads, Span, read_micro_batch
from pomscale.data.mixture import Mixture
from pomscale.data.packed_order import PackedOrder, deal

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepPart:
    """Place of a micro-batch in its step.

    Attributes:
        first: First position of the step.
        num_samples: Samples of the step on all ranks.
        is_last: Whether this is the last micro-batch of the step.
    """

    first: int
    num_samples: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """One forward pass of one rank. parts: its samples by shape, those whose frames have one size next to each other.

    A sample of weight 0 takes no part in the loss: it is bad, or repeated where a rank has no sample left in a step of
    several micro-batches, so that the ranks' collectives meet.
    """

    parts: tuple[MicroBatch, ...]
    step: StepPart


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Positions (b,) int64 of a micro-batch by shape, and the weight of them all."""

    positions: tuple[np.ndarray, ...]
    weight: float
    step: StepPart

    @property
    def span(self) -> Span:
        return self.step.first, self.step.first + self.step.num_samples - 1


def packed_pieces(order: PackedOrder, start: int, rank: int, num_ranks: int) -> Iterator[PackedPiece]:
    """Yield one rank's micro-batches, endlessly, from the step that begins at position `start` on."""
    for step in order.steps(start):
        bins = deal(step.tokens, num_ranks, order.micro_tokens)
        for number, of_ranks in enumerate(bins):
            rows = of_ranks[rank]
            weight = float(len(rows) > 0)
            if not weight:
                rows = np.array([step.tokens.argmin()])
            positions = tuple(step.first + of_shape for of_shape in order.by_shape(step, rows))
            yield PackedPiece(positions, weight, StepPart(step.first, step.num_samples, number == len(bins) - 1))


class PackedLoader(ReaderThreads[PackedPiece, T]):
    """Endless iterator over one rank's packed micro-batches, in order; each knows its step."""

    def __init__(
        self,
        mixture: Mixture,
        order: PackedOrder,
        *,
        rank: int,
        world_size: int,
        start_position: int,
        ahead: ReadAhead,
        finish: Callable[[PackedMicroBatch], T],
    ) -> None:
        """Start to read.

        Args:
            mixture: The datasets, in the order of global batch 1.
            order: The steps.
            rank: Number of this rank.
            world_size: Number of ranks.
            start_position: Position of the first sample, at which a step begins.
            ahead: Threads, prefetch and pinning.
            finish: Turns a PackedMicroBatch into the trainer's batch, inside the reader threads.
        """

        def read(piece: PackedPiece) -> T:
            parts = tuple(
                read_micro_batch(mixture, positions, np.full(len(positions), piece.weight, np.float32))
                for positions in piece.positions
            )
            return finish(PackedMicroBatch(parts, piece.step))

        pieces = packed_pieces(order, start_position, rank, world_size)
        super().__init__(mixture, pieces, lambda piece: piece.span, read, ahead)
