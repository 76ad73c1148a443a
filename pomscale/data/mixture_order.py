"""The sample order of any number of datasets and shapes: a record of one of them for each global position.

It is a pure function of (seed, position, manifests, weights, global batch, window). It makes three choices, each exact
and at the same cost for any position:

1. A step gets a *lane*: all records of one latent shape, in whatever dataset, so that a global batch has one shape.
2. A position in a lane gets a *component*: the records of one dataset that have the lane's shape.
3. A position in a component's endless stream gets a record (`SampleOrder`).

So batches straddle epochs, the rest of a shape at the end of an epoch begins the next one, and each component counts
epochs of its own. One dataset of one shape keeps the order of `SampleOrder`. Packed steps (`packed_order`), which may
hold any shapes, are runs of positions of the order whose global batch is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pomscale.data.interleave import Interleave
from pomscale.data.order import SampleOrder, groups
from pomscale.shards.schema import Manifest


@dataclass(frozen=True, slots=True)
class Component:
    """The records of one dataset that have one latent shape; they are neighbours in its index."""

    dataset: int
    shape: tuple[int, ...]
    share: Fraction  # of all samples
    first_shard: int
    first_record: int
    order: SampleOrder

    def window_shards(self, window: int) -> list[int]:
        """Return the shards of the dataset that have records of a window."""
        return [self.first_shard + shard for shard in self.order.window_shards(window)]


@dataclass(frozen=True, slots=True)
class Part:
    """Contribution of one component to a batch. Arrays (k,) int64."""

    component: int
    rows: np.ndarray  # positions in the batch
    records: np.ndarray  # record numbers in its dataset


@dataclass(frozen=True, slots=True)
class _Lane:
    components: list[int]
    interleave: Interleave


class MixtureOrder:
    """Positions count samples from the start of training; position p belongs to step p // global_batch.

    `weights`: share of the samples per dataset, relative to each other, kept to the last record (`Interleave`). Inside
    a dataset, which must not be empty, every record is as frequent as any other. Memory does not grow with the number
    of records. Safe to share between threads.
    """

    def __init__(
        self, manifests: Sequence[Manifest], weights: Sequence[float], *, seed: int, global_batch: int, window: int
    ) -> None:
        self.num_datasets = len(manifests)
        self.global_batch = global_batch
        self.components = _components(manifests, weights, seed, window)
        self._lanes = []
        self.shapes = list(dict.fromkeys(component.shape for component in self.components))
        for number, shape in enumerate(self.shapes):
            members = [c for c, component in enumerate(self.components) if component.shape == shape]
            interleave = Interleave([self.components[c].share for c in members], seed, subindex=1 + number)
            self._lanes.append(_Lane(members, interleave))
        lane_shares = [sum((self.components[c].share for c in lane.components), Fraction(0)) for lane in self._lanes]
        self._steps = Interleave(lane_shares, seed, subindex=0)

    def shape_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return the number in `shapes` of the latent shape at each position, int64 (b,) each."""
        return self._steps.locate(positions // self.global_batch)[0]

    def parts(self, positions: np.ndarray) -> list[Part]:
        """Return the records at positions, int64 (b,), by component. The rows of all parts make up b."""
        steps, offsets = np.divmod(positions, self.global_batch)
        lanes, batches = self._steps.locate(steps)
        parts = []
        rows = np.arange(len(positions))
        for number, here in groups(lanes):
            in_lane = rows[here]
            lane = self._lanes[number]
            streams, indices = lane.interleave.locate(batches[in_lane] * self.global_batch + offsets[in_lane])
            for stream, of_stream in groups(streams):
                component = self.components[lane.components[stream]]
                records = component.first_record + component.order.records(indices[of_stream])
                parts.append(Part(lane.components[stream], in_lane[of_stream], records))
        return parts

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first samples of training come from each component."""
        num_steps, rest = divmod(num_samples, self.global_batch)
        lane_samples = self._steps.counts(num_steps) * self.global_batch
        lane_samples[self._steps.locate(np.array([num_steps]))[0]] += rest
        counts = [0] * len(self.components)
        for lane, num_positions in zip(self._lanes, lane_samples.tolist(), strict=True):
            for component, count in zip(lane.components, lane.interleave.counts(num_positions).tolist(), strict=True):
                counts[component] = count
        return counts

    def shards_ahead(self, oldest: int, newest: int, last: int | None = None) -> list[list[int]]:
        """Return for each dataset the shards that the steps at positions `oldest` to `newest` and the next ones read.

        The shards of the windows in use come first, then those of the windows after them. last: the last position of
        the step at `newest`, by default that of a global batch.
        """
        last = newest + self.global_batch - 1 if last is None else last
        in_use: list[list[int]] = [[] for _ in range(self.num_datasets)]
        soon: list[list[int]] = [[] for _ in range(self.num_datasets)]
        counts = (self.counts(position) for position in (oldest, newest, last))
        for component, *reached in zip(self.components, *counts, strict=True):
            first, now, end = (component.order.window_at(count) for count in reached)
            for window in range(first, now + 1):
                in_use[component.dataset] += component.window_shards(window)
            for window in range(now + 1, max(now + 1, end) + 1):
                soon[component.dataset] += component.window_shards(window)
        return [list(dict.fromkeys(now + then)) for now, then in zip(in_use, soon, strict=True)]

    def epochs(self, num_samples: int) -> list[list[tuple[int, int]]]:
        """Return samples drawn and number of records of each component, by dataset, after `num_samples` samples."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_datasets)]
        for component, count in zip(self.components, self.counts(num_samples), strict=True):
            found[component.dataset].append((count, component.order.num_records))
        return found


def _components(manifests: Sequence[Manifest], weights: Sequence[float], seed: int, window: int) -> list[Component]:
    exact = [Fraction(weight) for weight in weights]
    components: list[Component] = []
    for dataset, (manifest, weight) in enumerate(zip(manifests, exact, strict=True)):
        first_shard = first_record = 0
        for group, info in enumerate(manifest.groups):
            sizes = [shard.num_samples for shard in manifest.shards if shard.group == group]
            if sum(sizes) > 0:
                order = SampleOrder(sizes, seed, window, component=len(components))
                share = weight / sum(exact) * order.num_records / manifest.num_samples
                components.append(Component(dataset, info.shape, share, first_shard, first_record, order))
            first_shard += len(sizes)
            first_record += sum(sizes)
    return components
