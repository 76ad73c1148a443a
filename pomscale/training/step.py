"""One step of training as the data gives it: the micro-batches of this rank, and the samples of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pomscale.data.loader import Loader
from pomscale.data.packed_loader import PackedLoader


@dataclass(frozen=True)
class TrainStep:
    """Data of one step.

    Attributes:
        micro_batches: Those of this rank; `bad` of each has the samples that could not be read.
        num_samples: Samples of all ranks, which the loss is the mean over.
    """

    micro_batches: Sequence[Any]
    num_samples: int

    def first(self, num_samples: int) -> TrainStep:
        """Return the step with its first samples alone: the others get weight 0."""
        if num_samples >= self.num_samples:
            return self
        return TrainStep([batch.first(num_samples) for batch in self.micro_batches], num_samples)


def steps(loader: Loader[Any]) -> Iterator[TrainStep]:
    """Iterate over the steps of one rank, all of one size."""
    while True:
        yield TrainStep([next(loader) for _ in range(loader.num_micro_batches)], loader.global_batch)


def packed_steps(loader: PackedLoader[Any]) -> Iterator[TrainStep]:
    """Iterate over the packed steps of one rank."""
    micro_batches = []
    for batch in loader:
        micro_batches.append(batch)
        if batch.step.is_last:
            yield TrainStep(micro_batches, batch.step.num_samples)
            micro_batches = []
