"""Division of flat tokens into chunks, and of chunks into runs of tokens that share a state.

The b samples' tokens lie one after another as rows. A chunk of rows passes through the matrix products at once; a run
is the part of a chunk whose tokens add to one state, or read one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

CHUNK_ROWS = 1152
"""Least number of rows of a chunk, unless there are fewer. Smaller ones cost the matrix products 5 to 25 %."""

Order: TypeAlias = Literal["none", "causal", "frames"]
ORDERS: tuple[Order, ...] = ("none", "causal", "frames")


@dataclass(frozen=True)
class Run:
    """Rows start .. stop - 1, which share state `state`.

    offset: number of tokens of the same segment before `start`. is_last: whether the segment ends at `stop`.
    """

    start: int
    stop: int
    state: int
    offset: int = 0
    is_last: bool = True


@dataclass(frozen=True)
class Chunk:
    """Rows start .. stop - 1, and their runs in order."""

    start: int
    stop: int
    runs: Sequence[Run]


def parts(chunk: Chunk) -> list[tuple[Run, slice]]:
    """Return the runs of a chunk with their rows in it."""
    return [(run, slice(run.start - chunk.start, run.stop - chunk.start)) for run in chunk.runs]


def num_chunks(rows: int) -> int:
    """Return the number of chunks of so many rows."""
    return max(1, rows // CHUNK_ROWS)


def _chunk_length(rows: int) -> int:
    return -(-rows // num_chunks(rows))


def largest_chunk(*rows: int) -> int:
    """Return the largest number of rows in a chunk."""
    return max(_chunk_length(each) for each in rows)


def chunks(runs: Sequence[Run], rows: int) -> list[Chunk]:
    """Cut `rows` rows, which the runs cover in order, into about equal chunks of at least CHUNK_ROWS."""
    length = max(1, _chunk_length(rows))
    found: list[Chunk] = []
    position = 0
    for start in range(0, rows, length):
        stop = min(start + length, rows)
        inside: list[Run] = []
        while position < len(runs) and runs[position].start < stop:
            run = runs[position]
            first, last = max(run.start, start), min(run.stop, stop)
            if first < last:
                offset = run.offset + first - run.start
                inside.append(Run(first, last, run.state, offset, run.is_last and last == run.stop))
            if run.stop > stop:
                break
            position += 1
        found.append(Chunk(start, stop, inside))
    return found


@dataclass(frozen=True)
class Layout:
    """Which tokens of b samples add to which states, and which read them.

    batch, num_queries, num_context: b, m, n. order: "none": a state per segment; "causal": a running one per segment;
    "frames": one per frame, which holds the frames before it. frame_length: with "frames". segments: (query tokens,
    context tokens) of each segment of a sample.
    """

    batch: int
    num_queries: int
    num_context: int
    order: Order
    frame_length: int
    segments: Sequence[tuple[int, int]]

    @property
    def frames(self) -> list[int]:
        """Number of states of each segment of a sample."""
        if self.order == "frames":
            return [-(-length // self.frame_length) for length, _ in self.segments]
        return [1] * len(self.segments)

    @property
    def num_states(self) -> int:
        """Number of states of all samples."""
        return self.batch * sum(self.frames)

    def folds(self, heads: int) -> bool:
        """Return whether the output map is applied to states and not to queries: y_n = sum_h s_nh (Wo_h H_h)."""
        return heads > 1 and self.order != "causal" and self.batch * self.num_queries > self.num_states

    def query_runs(self) -> list[Run]:
        """Return the runs of the queries."""
        return list(self._runs([length for length, _ in self.segments]))

    def context_runs(self) -> list[Run]:
        """Return the runs of the context."""
        return list(self._runs([length for _, length in self.segments]))

    def _runs(self, lengths: list[int]) -> Iterator[Run]:
        start = state = 0
        for _ in range(self.batch):
            for length, num_frames in zip(lengths, self.frames, strict=True):
                longest = self.frame_length if self.order == "frames" else max(length, 1)
                for offset in range(0, length, longest):
                    size = min(longest, length - offset)
                    yield Run(start + offset, start + offset + size, state + offset // longest, offset)
                start += length
                state += num_frames

    def counts(self, takes_part: Tensor | None, device: torch.device) -> Tensor:
        """Return the number of tokens in each state, at least 1, as (states,); takes_part is a padding mask (b n)."""
        if takes_part is not None:
            return takes_part.sum(1).clamp(min=1)
        numbers = [
            min((frame + 1) * self.frame_length, length) if self.order == "frames" else length
            for (_, length), num_frames in zip(self.segments, self.frames, strict=True)
            for frame in range(num_frames)
        ]
        return torch.tensor(numbers * self.batch, device=device).clamp(min=1)

    def running_(self, sums: Tensor, *, backward: bool = False) -> Tensor:
        """Add to each state (states, W) those of earlier frames of its segment, or of later ones, in place."""
        if self.order != "frames":
            return sums
        ends = list(accumulate(self.frames * self.batch))
        for stop, num_frames in zip(ends, self.frames * self.batch, strict=True):
            of_segment = sums[stop - num_frames : stop]
            of_segment.copy_(of_segment.flip(0).cumsum(0).flip(0) if backward else of_segment.cumsum(0))
        return sums
