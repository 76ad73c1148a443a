"""Results of an experiment: the measures of every point, their spread over seeds, and results.json, which has both."""

from __future__ import annotations

import difflib
import json
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.config.experiment import ExperimentRecipe, MeasureConfig
from pomscale.config.mixer import PomMixer
from pomscale.config.train import TrainRecipe
from pomscale.experiments.points import Experiment, Point, Training
from pomscale.experiments.steps import asked_of_point, is_done, is_training_done
from pomscale.monitoring.machine import machine
from pomscale.plan.model_cost import num_parameters, training_flops
from pomscale.runs.history import read_history

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Measured:
    """Figures of one point with one seed; values are names of values by axis."""

    values: dict[str, str]
    seed: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """A measure over the seeds of a point: mean, sample standard deviation (0 for one seed), least and greatest."""

    mean: float
    std: float
    least: float
    greatest: float
    num: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        std = statistics.stdev(figures) if len(figures) > 1 and all(map(math.isfinite, figures)) else 0.0
        return cls(sum(figures) / len(figures), std, min(figures), max(figures), len(figures))


@dataclass(frozen=True)
class Row:
    """A point of the grid over all of its seeds."""

    values: dict[str, str]
    spreads: dict[str, Spread]


@dataclass(frozen=True)
class Results:
    """What an experiment has measured so far. missing: points that are not done, with their seeds."""

    recipe: ExperimentRecipe
    command: str
    measured: list[Measured]
    missing: list[str]
    machine: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """The points in the order of the grid."""
        groups: dict[tuple[str, ...], list[Measured]] = {}
        for one in self.measured:
            groups.setdefault(tuple(one.values.values()), []).append(one)
        return [
            Row(
                group[0].values,
                {name: Spread.of([one.figures[name] for one in group]) for name in self.recipe.measures},
            )
            for group in groups.values()
        ]


def collect(experiment: Experiment) -> Results:
    """Read the measures of all points that are done. Raises InputError for a measure that is not there."""
    measured, missing = [], []
    for point in experiment.points:
        if _is_measured(experiment, point):
            measured.append(Measured(point.values, point.seed, read_measures(experiment.recipe, point)))
        else:
            missing.append(point.name)
    threads = {"omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    command = shlex.join(["pomscale", *experiment.command])
    return Results(experiment.recipe, command, measured, missing, machine() | threads)


def _is_measured(experiment: Experiment, point: Point) -> bool:
    trained = all(is_training_done(training) for training in point.trainings.values())
    return trained and (not point.commands or is_done(experiment, point.name, asked_of_point(point)))


def read_measures(recipe: ExperimentRecipe, point: Point) -> dict[str, float]:
    """Return the figures of a point by measure. Raises InputError, naming what there is, for one that is not there."""
    figures = {}
    for name, measure in recipe.measures.items():
        try:
            figures[name] = _read(measure, point)
        except InputError as error:
            raise InputError(f"measures.{name}: {error}") from error
    return figures


def _read(measure: MeasureConfig, point: Point) -> float:
    if measure.file is not None:
        assert measure.key is not None
        return _of_file(point.folder / measure.file, measure.key)
    training = point.trainings[measure.of] if measure.of else list(point.trainings.values())[-1]
    if measure.metric is not None:
        return _of_history(training, measure.metric)
    return _of_recipe(training.recipe, str(measure.plan))


def _of_file(path: Path, key: str) -> float:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}; the commands of `run` are to write it") from error
    for part in key.split("."):
        known = found if isinstance(found, dict) else dict(enumerate(found)) if isinstance(found, list) else {}
        index: Any = int(part) if isinstance(found, list) and part.isdigit() else part
        if index not in known:
            raise InputError(f"{path}: has no {key!r}{_nearest(part, map(str, known))}")
        found = known[index]
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise InputError(f"{path}: {key!r} is no number, but {json.dumps(found)[:60]}")
    return float(found)


def _of_history(training: Training, metric: str) -> float:
    series = read_history(training.folder).series
    if metric not in series:
        raise InputError(f"{training.folder}: has no metric {metric!r}{_nearest(metric, series)}")
    return series[metric][1][-1]


def _of_recipe(recipe: TrainRecipe, what: str) -> float:
    if what == "parameters":
        return num_parameters(recipe.model)
    if what == "training_flops":
        return training_flops(recipe.model) * recipe.training.total_samples
    states = [mixer.width(recipe.model.dim) for mixer in recipe.model.mixers if isinstance(mixer, PomMixer)]
    return max(states, default=0)


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(names[:12]) or 'none'}"


def write_results(folder: Path, results: Results) -> None:
    """Write results.json; numbers that are not finite are null in it."""
    content = {
        "experiment": results.recipe.name,
        "command": results.command,
        **results.machine,
        "rows": [{"values": row.values, "measures": _spreads(row.spreads)} for row in results.rows],
        "points": [asdict(one) | {"figures": _finite(one.figures)} for one in results.measured],
        "missing": results.missing,
        "recipe": results.recipe.model_dump(mode="json"),
    }
    write_text(folder / RESULTS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _spreads(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {name: _finite(asdict(spread)) for name, spread in spreads.items()}


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}
