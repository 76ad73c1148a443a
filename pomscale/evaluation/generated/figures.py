"""Values of the metrics, from what was kept of all parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.metric_choice import METRICS, Choice, Want
from pomscale.evaluation.generated.pictures_hash import add_hashes
from pomscale.evaluation.generated.statistics_files import Statistics
from pomscale.evaluation.generated.sums import Scores, Sum, merge
from pomscale.evaluation.generated.work_folder import PartFiles
from pomscale.metrics.frechet import frechet_distance
from pomscale.metrics.inception_score import TORCH_FIDELITY_SEED, InceptionScore
from pomscale.metrics.kernels import Subsets, cmmd, kid
from pomscale.metrics.moments import Gaussian, Moments
from pomscale.metrics.neighbours import NeighbourMetrics, neighbour_metrics

_OF_NEIGHBOURS = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Conventions:
    """Choices in which packages differ, as part of a result.

    Attributes:
        splits: Splits of the inception score.
        splits_shuffled: Whether the pictures are shuffled into splits as torch-fidelity does; ADM keeps their order.
        kid_subsets: (number, size) of random subsets for KID, as torch-fidelity takes (100, 1000); None = all at once.
        manifold_k: Neighbours of precision and recall.
        density_k: Neighbours of density and coverage.
    """

    splits: int = 10
    splits_shuffled: bool = True
    kid_subsets: tuple[int, int] | None = None
    manifold_k: int = 3
    density_k: int = 5

    @property
    def shuffle_seed(self) -> int | None:
        """Seed with which pictures are shuffled into splits; None keeps their order."""
        return TORCH_FIDELITY_SEED if self.splits_shuffled else None

    def settings(self, metrics: Sequence[str]) -> dict[str, Any]:
        """Return those that some metrics depend on, as JSON."""
        values = asdict(self)
        users = {
            "splits": ("inception_score",),
            "splits_shuffled": ("inception_score",),
            "kid_subsets": ("kid",),
            "manifold_k": ("precision", "recall"),
            "density_k": ("density", "coverage"),
        }
        return {name: values[name] for name, of in users.items() if set(of) & set(metrics)}


@dataclass(frozen=True)
class Totals:
    """Sums and features of all pictures of one side.

    Attributes:
        count: Number of pictures.
        sha256: Hash (hex) of their numbers and bytes, see `pictures_hash.add_hashes`; parts do not change it.
        labels: Number of pictures by class; empty without classes.
        failures: (name, reason) of pictures that could not be read.
        sums: Sums by what is wanted.
        features: Features of the parts, memory-mapped, by what is wanted.
    """

    count: int
    sha256: str
    labels: Counter[str]
    failures: list[tuple[str, str]]
    sums: dict[Want, Sum]
    features: dict[Want, list[np.ndarray]]

    def facts(self) -> dict[str, Any]:
        """Return what is known of the pictures, as JSON."""
        facts: dict[str, Any] = {"count": self.count, "sha256": self.sha256, "failures": len(self.failures)}
        if self.labels:
            fewest, most = min(self.labels.values()), max(self.labels.values())
            facts["labels"] = {"number": len(self.labels), "fewest": fewest, "most": most}
        return facts


def put_together(files: PartFiles, num_parts: int, wants: Sequence[Want]) -> Totals:
    """Put parts together, in their order; one part at a time is in memory."""
    hashes, labels = list[str](), Counter[str]()
    totals = Totals(0, "", labels, [], {}, {want: [] for want in wants if want.kept == "features"})
    count = 0
    for part in range(num_parts):
        record = files.record(part)
        hashes.append(record.sha256)
        count += record.count
        labels.update(record.labels)
        totals.failures.extend((where, reason) for where, reason in record.failures)
        merge(totals.sums, files.sums(part, wants))
        for want, parts in totals.features.items():
            if record.count:  # else no picture of the part could be read
                parts.append(files.features(part, want))
    return replace(totals, count=count, sha256=add_hashes(hashes))


@dataclass
class Figures:
    """Values by metric, and what belongs to them."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Compared(NamedTuple):
    """Everything that metrics are computed from."""

    source: Totals
    reference: Totals | None
    statistics: Statistics | None

    def features(self, want: Want) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the features of source and reference."""
        assert self.reference is not None
        return self.source.features[want], self.reference.features[want]

    def moments(self, want: Want) -> tuple[Moments, Moments | Gaussian]:
        """Return the moments of source and reference."""
        mine = self.source.sums[want]
        assert isinstance(mine, Moments)
        if self.statistics is not None:
            return mine, self.statistics.gaussians[want.feature]
        assert self.reference is not None
        theirs = self.reference.sums[want]
        assert isinstance(theirs, Moments)
        return mine, theirs


def compute(choice: Choice, compared: Compared, conventions: Conventions) -> Figures:
    """Compute all metrics. InputError, naming the metric, where the features do not fit or are not finite."""
    figures = Figures()
    neighbours = [name for name in choice.wants if name in _OF_NEIGHBOURS]
    for name, want in choice.wants.items():
        if name in figures.values:
            continue
        try:
            if name in neighbours:
                figures.values |= _neighbours(neighbours, compared.features(want), conventions)
            else:
                _compute_one(figures, name, want, compared, conventions)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    figures.values = {name: figures.values[name] for name in METRICS if name in figures.values}
    return figures


def _compute_one(figures: Figures, name: str, want: Want, compared: Compared, conventions: Conventions) -> None:
    if want.kept == "moments":
        distance = frechet_distance(*compared.moments(want))
        figures.values[name] = distance.value
        figures.details[name] = {"mean_term": distance.mean_term, "ranks": list(distance.ranks)}
        figures.warnings += [f"{name}: {text}" for text in distance.warnings]
    elif name == "inception_score":
        score = compared.source.sums[want]
        assert isinstance(score, InceptionScore)
        figures.values[name], deviation = score.score()
        figures.details[name] = {"deviation_of_splits": deviation}
    elif name == "kid":
        subsets = None if conventions.kid_subsets is None else Subsets(*conventions.kid_subsets)
        figures.values[name], deviation = kid(*compared.features(want), subsets)
        figures.details[name] = {"deviation_of_subsets": deviation}
    elif name == "cmmd":
        figures.values[name] = cmmd(*compared.features(want))
    else:
        scores = compared.source.sums[want]
        assert isinstance(scores, Scores)
        figures.values[name] = scores.total / scores.count


def _neighbours(
    names: Sequence[str], features: tuple[list[np.ndarray], list[np.ndarray]], conventions: Conventions
) -> dict[str, float]:
    """Return those of the four metrics that are asked for, from one pass over the features."""
    found: NeighbourMetrics = neighbour_metrics(
        *features,
        manifold_k=conventions.manifold_k if {"precision", "recall"} & set(names) else None,
        density_k=conventions.density_k if {"density", "coverage"} & set(names) else None,
    )
    values: Mapping[str, float | None] = asdict(found)
    return {name: value for name in names if (value := values[name]) is not None}
