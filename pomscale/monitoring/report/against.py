"""`pomscale report RUN --against REFERENCE`: whether and where a run leaves the band of reference curves.

The band is the mean of the reference's runs plus and minus 5 spreads, a spread being the standard deviation of the
distance of one more run to that mean (`reference.Curve`). Three runs tell that deviation only roughly: points of a
curve depend on each other, so that it has few degrees of freedom. With 6 of them, Student's t leaves to 4.9
deviations what the normal distribution leaves to 3: one point in 400. A fourth seed of the quickstart came to 4.0
where its loss falls fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pomscale.base.console import format_count
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write
from pomscale.monitoring.report.plots import Panel, draw_overview
from pomscale.monitoring.report.reference import (
    Curve,
    Reference,
    dataset_fingerprints,
    differences,
    key_of,
    metrics_of,
    recipe_of,
)
from pomscale.runs.history import read_history
from pomscale.runs.layout import AGAINST_FILE
from pomscale.runs.metric_names import EVALUATION_PREFIX

NUM_SPREADS = 5.0


@dataclass(frozen=True)
class Compared:
    """One metric of a run beside its reference, at the samples that both have: distances in spreads, by point."""

    metric: str
    samples: list[int]
    values: list[float]
    expected: list[float]
    spread: list[float]

    @property
    def distances(self) -> list[float]:
        """Distance to the mean in spreads, by point; positive above it. Infinite for values that are not finite."""
        found = []
        for value, mean, spread in zip(self.values, self.expected, self.spread, strict=True):
            if not math.isfinite(value):
                found.append(math.inf)
            elif spread:
                found.append((value - mean) / spread)
            else:  # the mean is 0 in all runs
                found.append(0.0 if value == mean else math.copysign(math.inf, value - mean))
        return found

    @property
    def first_outside(self) -> int | None:
        """Index of the first point outside the band; None if there is none."""
        return next((at for at, distance in enumerate(self.distances) if abs(distance) > NUM_SPREADS), None)

    def line(self) -> str:
        """Return the finding in words."""
        distances, at = self.distances, self.first_outside
        if at is None:
            farthest = max(range(len(distances)), key=lambda point: abs(distances[point]))
            return (
                f"{self.metric}: inside, at most {abs(distances[farthest]):.1f} of {NUM_SPREADS:g} spreads away "
                f"(at {self.samples[farthest]:,} samples; {_points(len(distances))} up to {self.samples[-1]:,})"
            )
        num_outside = sum(abs(distance) > NUM_SPREADS for distance in distances)
        side = "above" if distances[at] > 0 else "below"
        return (
            f"{self.metric}: OUTSIDE from {self.samples[at]:,} samples on: {self.values[at]:.5g} where "
            f"{self.expected[at]:.5g} +- {NUM_SPREADS * self.spread[at]:.2g} was expected, {abs(distances[at]):.1f} "
            f"spreads {side} ({num_outside} of {_points(len(distances))} outside)"
        )


def _points(number: int) -> str:
    return f"{number} point{'s' * (number != 1)}"


@dataclass(frozen=True)
class Verdict:
    """A run beside a reference. notes: what was not compared, and what else differs."""

    folder: Path
    reference: Reference
    metrics: list[Compared]
    notes: list[str]

    @property
    def is_inside(self) -> bool:
        """Whether the run stays inside the band of every metric."""
        return all(metric.first_outside is None for metric in self.metrics)

    def words(self) -> str:
        """Return the verdict in words, a line per metric."""
        reference = self.reference
        seeds = ", ".join(map(str, reference.seeds))
        verdict = "stays inside the band of" if self.is_inside else "LEAVES the band of"
        lines = [f"{self.folder} {verdict} {reference.name} (seed{'s' * (len(reference.seeds) > 1)} {seeds})"]
        lines += [f"  {metric.line()}" for metric in self.metrics]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare_with(folder: Path, reference: Reference, *, other_recipe: bool = False) -> Verdict:
    """Compare a run with reference curves.

    Args:
        folder: the run folder; the run may still be going on.
        reference: the curves.
        other_recipe: compare although the recipes differ, and note all differences.

    Raises:
        InputError: the run is one of another recipe (the first difference is named), or has no point in common.
    """
    recipe, history = recipe_of(folder), read_history(folder)
    notes = differences(reference.recipe, recipe)
    if notes and not other_recipe:
        raise InputError(
            f"{folder}: a run of another recipe than {reference.name}: {notes[0]}; --other-recipe compares all the same"
        )
    found, missing = [], []
    for metric, curve in reference.curves.items():
        if metric not in metrics_of(history):
            missing.append(metric)
        elif key_of(history, metric) != curve.key:
            notes.append(f"{metric} is not compared: it was measured with other settings")
        elif (compared := _compared(metric, curve, history.series[metric])) is None:
            notes.append(f"{metric} is not compared: there are no samples at which both were measured")
        else:
            found.append(compared)
    notes += [f"not measured by this run: {', '.join(missing)}"] if missing else []
    if not found:
        raise InputError(f"{folder}: nothing to compare with {reference.name}: {'; '.join(notes)}")
    datasets = dataset_fingerprints(folder)
    if datasets and reference.datasets and datasets != reference.datasets:
        notes.append("the training data have another fingerprint than the reference's")
    last = max(curve.samples[-1] for curve in reference.curves.values())
    if (reached := max(one.samples[-1] for one in found)) < last:
        notes.append(f"compared up to {format_count(reached)} samples; the reference has {format_count(last)}")
    return Verdict(folder, reference, found, notes)


def _compared(metric: str, curve: Curve, series: tuple[list[int], list[float]]) -> Compared | None:
    of_run = dict(zip(*series, strict=True))
    points = [
        (at, of_run[at], mean, spread)
        for at, mean, spread in zip(curve.samples, curve.mean, curve.spread, strict=True)
        if at in of_run
    ]
    if not points:
        return None
    samples, values, expected, spread = (list(column) for column in zip(*points, strict=True))
    return Compared(metric, [int(at) for at in samples], values, expected, spread)


def write_picture(verdicts: Sequence[Verdict], folder: Path) -> Path:
    """Write against.png into a folder, a panel per metric with the band and the runs, and return its path."""
    reference = verdicts[0].reference
    panels = []
    for metric, curve in reference.curves.items():
        runs = {str(one.folder): found for one in verdicts for found in one.metrics if found.metric == metric}
        if not runs or len(curve.samples) < 2:
            continue  # a single point is in the words
        mean, width = curve.mean, [NUM_SPREADS * spread for spread in curve.spread]
        low = [value - by for value, by in zip(mean, width, strict=True)]
        high = [value + by for value, by in zip(mean, width, strict=True)]
        label = f"mean of {reference.name}"
        lines = {label: (curve.samples, mean)}
        lines |= {name: (found.samples, found.values) for name, found in runs.items()}
        panels.append(Panel(metric.removeprefix(EVALUATION_PREFIX), lines, bands={label: (curve.samples, low, high)}))
    path = folder / AGAINST_FILE
    with atomic_write(path) as stream:
        stream.write(draw_overview(f"against {reference.name}, band of {NUM_SPREADS:g} spreads", panels, {}))
    return path
