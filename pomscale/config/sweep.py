"""A grid in a recipe: one run per point.

    sweep:
      optimizer.lr: [1e-4, 2e-4]
      model.degree: [2, 3]

These are four runs, NAME.lr=0.0001-degree=2 and so on, in the wandb group NAME.
"""

from __future__ import annotations

import copy
import itertools
import json
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.names import MAX_NAME_BYTES, folder_words, shortened
from pomscale.config.load import load_train_recipe, read_recipe_source, validate
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError, RecipeSource

# Fields that name a point, or that make a recipe a sweep.
_NOT_SWEPT = {"kind", "name", "output", "sweep"}


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    values are those of the grid by dotted key; recipe is that of this run alone, with a name of its own.
    """

    values: dict[str, Any]
    recipe: TrainRecipe


def check_is_one_run(recipe: TrainRecipe, path: str | Path) -> None:
    """Raise RecipeError, with the remedy, for a recipe that is several runs."""
    if not recipe.sweep:
        return
    first = shlex.join(f"{key}={_text(values[0])}" for key, values in recipe.sweep.items())
    raise RecipeError(
        [
            f"{path}: sweep: this recipe is several runs; start them all with `pomscale launch {path} --cluster ...`, "
            f"or one by itself: `pomscale train {path} sweep={{}} name=NAME {first}`"
        ]
    )


def load_points(path: str | Path, overrides: list[str] | None = None) -> list[SweepPoint]:
    """Return the runs of a recipe with a sweep, the last key changing fastest; [] for a recipe without one.

    Raises RecipeError, which names the line of the sweep and the point, for a point that is no valid recipe.
    """
    recipe = load_train_recipe(path, overrides)
    if not recipe.sweep:
        return []
    source = read_recipe_source(path, overrides)
    _check_keys(source, recipe)
    labels = _labels(recipe.sweep)
    words = {key: folder_words(map(_text, values)) for key, values in recipe.sweep.items()}
    points, problems = [], dict[str, str]()
    for values in itertools.product(*recipe.sweep.values()):
        point = dict(zip(recipe.sweep, values, strict=True))
        name = "-".join(f"{labels[key]}={words[key][_text(value)]}" for key, value in point.items())
        try:
            points.append(SweepPoint(point, _recipe_at(source, recipe, point, name)))
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault(problem, name)
    if problems:
        raise RecipeError([f"{problem} (sweep: {name})" for problem, name in problems.items()])
    _check_names(source, points)
    return points


def _recipe_at(source: RecipeSource, recipe: TrainRecipe, point: dict[str, Any], name: str) -> TrainRecipe:
    at = copy.deepcopy(source)
    sweep = source.origin(("sweep",))
    for key, value in point.items():
        at.set(tuple(key.split(".")), copy.deepcopy(value), source.origin(("sweep", key)))
    at.set(("name",), shortened(f"{recipe.name}.{name}", MAX_NAME_BYTES), sweep)
    at.set(("sweep",), {}, sweep)
    if recipe.monitoring.wandb.group is None:
        at.set(("monitoring", "wandb", "group"), recipe.name, sweep)
    point_recipe = validate(at)
    assert isinstance(point_recipe, TrainRecipe)
    return point_recipe


def _check_keys(source: RecipeSource, recipe: TrainRecipe) -> None:
    for key in recipe.sweep:
        if key.partition(".")[0] in _NOT_SWEPT:
            raise RecipeError([f"{source.origin(('sweep', key))}: sweep: {key!r} cannot be changed by a sweep"])


def _check_names(source: RecipeSource, points: list[SweepPoint]) -> None:
    for name, count in Counter(point.recipe.name for point in points).items():
        if count > 1:
            raise RecipeError(
                [f"{source.origin(('sweep',))}: sweep: {count} points would be called {name}; a value is there twice"]
            )


def _labels(sweep: dict[str, list[Any]]) -> dict[str, str]:
    """Return key -> its last word, or the whole key where two keys have the same last word."""
    last = {key: key.rpartition(".")[2] for key in sweep}
    shared = Counter(last.values())
    return {key: word if shared[word] == 1 else key for key, word in last.items()}


def _text(value: Any) -> str:
    """Write a value as an override has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
