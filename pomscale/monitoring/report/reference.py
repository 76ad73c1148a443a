"""Reference curves: what a recipe's held-out loss and metrics were in several runs that differ in their seed alone.

    recipes/reference/NAME.json
        recipe      the resolved recipe of the first run
        seeds       the seed of each run
        versions    pomscale, Python and the packages that numbers depend on
        datasets    fingerprints of the data that was trained on; empty if no checkpoint was left to tell
        curves      metric -> {"samples": [...], "values": [values of a run, ...], "key": of the settings, see runs}

A curve's mean and spread over the seeds follow from the values of the runs, see `Curve`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import ValidationError

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.config.identity import NOT_OF_THE_LATENTS
from pomscale.config.load import load_train_recipe
from pomscale.config.shipped import shipped_references
from pomscale.config.train import TrainRecipe
from pomscale.monitoring.report.run import FAMILY, read_object
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.history import History, read_history
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER, RECIPE_FILE
from pomscale.runs.metric_names import EVALUATION_PREFIX, evaluation_of
from pomscale.runs.result_settings import flat, result_key

HELD_OUT = "validation/loss"

# Settings on which no curve depends, but for rounding: names, places, layout of the ranks, what is saved and shown.
_NOT_OF_THE_CURVE = (
    "name", "output", "seed", "resume", "mesh", "engine", "fsdp2", "deepspeed", "faults", "checkpoint", "sampling",
    "monitoring", "evaluations", "profile", "sweep", "compute.device", "compute.compile", "compute.mixer_memory",
    "compute.activation_checkpointing", "data.path", "data.text", "data.features", "data.num_threads", "data.prefetch",
    "data.reading", "data.cache", "data.bad_samples", "data.max_bad_samples", "training.micro_batch", "init_from.path",
    "validation.path", "validation.text", "validation.every_samples", "validation.batch",
    *(f"codec.{key}" for key in NOT_OF_THE_LATENTS),
)  # fmt: skip

# A spread over three runs is a rough estimate: at single samples it may be near zero by chance. So it is at least the
# root mean square over the curve, and at least what another machine's rounding may make, relative to the mean.
_FLOOR = 0.001
# Figures of generated samples have a sampling error of their own, and often a single point to estimate it from.
_FLOOR_OF_SAMPLES = 0.02
# One run has no spread; this share of its value stands for it.
_SPREAD_OF_ONE = 0.01


@dataclass(frozen=True)
class Curve:
    """A metric by samples, of several runs: values[run][point].

    key: `result_key` of its settings. floor: least spread relative to the mean.
    """

    samples: list[int]
    values: list[list[float]]
    key: str = ""
    floor: float = _FLOOR

    @property
    def mean(self) -> list[float]:
        """Mean over the runs, by point."""
        return [fmean(at) for at in zip(*self.values, strict=True)]

    @property
    def spread(self) -> list[float]:
        """Standard deviation, by point, of the distance of one more run to the mean; see _FLOOR.

        The distance between a new run and the mean of n runs has the variance s^2 (1 + 1/n).
        """
        num_runs, mean = len(self.values), self.mean
        if num_runs == 1:
            own = [_SPREAD_OF_ONE * abs(value) for value in mean]
        else:
            own = [stdev(at) for at in zip(*self.values, strict=True)]
        relative = [(spread / value) ** 2 for spread, value in zip(own, mean, strict=True) if value]
        least = max(self.floor, math.sqrt(fmean(relative)) if relative else 0.0)
        factor = math.sqrt(1 + 1 / num_runs)
        return [factor * max(spread, least * abs(value)) for spread, value in zip(own, mean, strict=True)]


@dataclass(frozen=True)
class Reference:
    """Curves of runs of one recipe. name: in messages."""

    name: str
    recipe: TrainRecipe
    seeds: list[int]
    versions: dict[str, str]
    datasets: list[str]
    curves: dict[str, Curve]


def find_reference(words: Sequence[str]) -> Reference:
    """Read a curve file, given by path or by the name of a shipped one, or make the reference of run folders.

    Raises InputError if there is none, or if the runs are not of one recipe.
    """
    if len(words) == 1 and not Path(words[0]).is_dir():
        path = Path(words[0])
        shipped = shipped_references()
        if not path.is_file() and words[0] not in shipped:
            names = ", ".join(shipped)
            raise InputError(f"--against {words[0]}: no curve file, no run folder, and not one of the shipped {names}")
        return read_reference(path if path.is_file() else shipped[words[0]])
    return reference_of([Path(word) for word in words])


def read_reference(path: Path) -> Reference:
    """Read a curve file. InputError, naming it, if it is none, or one of a version with other recipes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        curves = {
            name: Curve(curve["samples"], curve["values"], curve["key"], _floor(name))
            for name, curve in content["curves"].items()
        }
        recipe = TrainRecipe.model_validate(content["recipe"])
        found = Reference(path.stem, recipe, content["seeds"], content["versions"], content["datasets"], curves)
    except ValidationError as error:
        raise InputError(f"{path}: its recipe is not one of this version: {error}; write it again") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a file of `pomscale report --write-reference`: {error!r}") from error
    if not curves:
        raise InputError(f"{path}: has no curves; write it again")
    for name, curve in curves.items():
        if not curve.samples or [len(values) for values in curve.values] != [len(curve.samples)] * len(found.seeds):
            raise InputError(f"{path}: {name} does not have a value per seed and samples")
        if not all(_is_number(value) for value in chain(curve.samples, *curve.values)):
            raise InputError(f"{path}: {name} has values that are no finite numbers")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_reference(reference: Reference, path: Path) -> None:
    """Write a curve file."""
    content = {
        "recipe": reference.recipe.model_dump(mode="json"),
        "seeds": reference.seeds,
        "versions": reference.versions,
        "datasets": reference.datasets,
    }
    head = json.dumps(content, indent=1).removesuffix("\n}")
    curves = (  # one line per curve, so that a file of many points can still be read
        f"  {json.dumps(name)}: " + json.dumps({"samples": curve.samples, "values": curve.values, "key": curve.key})
        for name, curve in reference.curves.items()
    )
    write_text(path, f'{head},\n "curves": {{\n' + ",\n".join(curves) + "\n }\n}\n")


def reference_of(folders: Sequence[Path]) -> Reference:
    """Return the curves of runs that differ in their seed alone.

    A metric counts if all of the runs have it, with the same settings, and at the samples that all of them have.

    Raises:
        InputError: a folder is no run, the recipes differ, a seed is there twice, or there is no held-out loss.
    """
    recipes = [recipe_of(folder) for folder in folders]
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        if (difference := first_difference(recipes[0], recipe)) is not None:
            raise InputError(f"{folders[0]} and {folder} are runs of two recipes: {difference}")
    seeds = [recipe.seed for recipe in recipes]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"reference: runs must differ in their seed, and these have {', '.join(map(str, seeds))}")
    histories = [read_history(folder) for folder in folders]
    curves = {name: curve for name in metrics_of(histories[0]) if (curve := _common(histories, name)) is not None}
    if HELD_OUT not in curves:
        raise InputError(f"{folders[0]}: there is no {HELD_OUT} that all runs have at the same samples; add validation")
    newest = histories[0].starts[-1] if histories[0].starts else {}
    name = ", ".join(folder.name for folder in folders)
    return Reference(name, recipes[0], seeds, newest.get("versions", {}), dataset_fingerprints(folders[0]), curves)


def recipe_of(folder: Path) -> TrainRecipe:
    """Return the recipe of a run. Raises InputError if the folder is none of a run."""
    if not (folder / RECIPE_FILE).is_file():
        raise InputError(f"{folder}: no run folder: it has no {RECIPE_FILE}")
    return load_train_recipe(folder / RECIPE_FILE)


def metrics_of(history: History) -> list[str]:
    """Return the metrics that are compared: the held-out loss, and figures of checkpoints but for lists of them."""
    figures = sorted(name for name in history.series if name.startswith(EVALUATION_PREFIX))
    return [name for name in (HELD_OUT, *figures) if name in history.series and not FAMILY.fullmatch(name)]


def key_of(history: History, metric: str) -> str:
    """Return the `result_key` of a metric's settings."""
    return result_key(history.settings.get(evaluation_of(metric), {}))


def _common(histories: Sequence[History], metric: str) -> Curve | None:
    if any(metric not in history.series for history in histories):
        return None
    keys = {key_of(history, metric) for history in histories}
    by_samples = [dict(zip(*history.series[metric], strict=True)) for history in histories]
    samples = sorted(set.intersection(*(set(values) for values in by_samples)))
    values = [[float(f"{of_run[at]:.7g}") for at in samples] for of_run in by_samples]
    if len(keys) > 1 or not samples or not all(math.isfinite(value) for of_run in values for value in of_run):
        return None
    return Curve(samples, values, keys.pop(), _floor(metric))


def _floor(metric: str) -> float:
    return _FLOOR_OF_SAMPLES if metric.startswith(EVALUATION_PREFIX) else _FLOOR


def first_difference(one: TrainRecipe, other: TrainRecipe) -> str | None:
    """Return the first setting in which two recipes differ that their curves depend on; None if there is none."""
    return next(iter(differences(one, other)), None)


def differences(one: TrainRecipe, other: TrainRecipe) -> list[str]:
    """Return the settings in which two recipes differ and that curves depend on, one line each."""
    ones, others = _of_the_curve(one), _of_the_curve(other)
    return [
        f"{key}: {json.dumps(ones.get(key))} there, {json.dumps(others.get(key))} here"
        for key in dict.fromkeys([*ones, *others])
        if ones.get(key) != others.get(key)
    ]


def _of_the_curve(recipe: TrainRecipe) -> Mapping[str, Any]:
    content = recipe.model_dump(mode="json")
    for component in content["data"]["mixture"]:
        del component["path"], component["text"]
    return {
        key: value
        for key, value in flat(content).items()
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in _NOT_OF_THE_CURVE)
    }


def dataset_fingerprints(folder: Path) -> list[str]:
    """Return the fingerprints of the training data by the run's newest checkpoint; empty if there is none."""
    for checkpoint in reversed(complete_checkpoints(folder / CHECKPOINTS_FOLDER)):
        datasets = read_object(checkpoint / CHECKPOINT_META).get("data", [])
        return [str(dataset["fingerprint"]) for dataset in datasets if "fingerprint" in dataset]
    return []
