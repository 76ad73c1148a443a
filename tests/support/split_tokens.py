"""Ranks that are threads of this process, for tests of split tokens: autograd sees the computation of all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from pomscale.ops.pom import TokenSplit

T = TypeVar("T")


@dataclass
class Meeting:
    """What the ranks bring to a collective. num_elements: those of each collective that rank 0 has called."""

    size: int
    brought: dict[int, Tensor] = field(default_factory=dict)
    num_elements: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True)
class ThreadCollectives:
    """Collectives of one rank, plain sums and stacks, whose gradients autograd knows."""

    meeting: Meeting
    rank: int

    def _all(self, name: str, x: Tensor) -> list[Tensor]:
        meeting = self.meeting
        meeting.brought[self.rank] = x
        if self.rank == 0:
            meeting.num_elements.append((name, x.numel()))
        meeting.barrier.wait()
        everyone = [meeting.brought[rank] for rank in range(meeting.size)]
        meeting.barrier.wait()  # nobody brings the next thing before all have taken this one
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all("all-reduce", x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all("all-gather", x))


def on_ranks(lengths: Sequence[int], compute: Callable[[TokenSplit], T]) -> tuple[list[T], list[tuple[str, int]]]:
    """Call `compute` on every rank of a split into runs of `lengths` tokens.

    Returns the results by rank, and the collectives: name, and number of elements that a rank brings.
    """
    meeting = Meeting(len(lengths))
    bounds = tuple(sum(lengths[:rank]) for rank in range(len(lengths) + 1))
    splits = [TokenSplit(bounds, rank, ThreadCollectives(meeting, rank)) for rank in range(len(lengths))]
    with ThreadPoolExecutor(len(lengths)) as threads:
        return list(threads.map(compute, splits)), meeting.num_elements
