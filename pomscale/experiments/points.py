"""Expansion of an experiment: the trainings and commands of every point of its grid, all checked before any begins."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pomscale.base.names import MAX_NAME_BYTES, folder_words, shortened
from pomscale.config.experiment import PLACEHOLDER, ExperimentRecipe, ExperimentTrainingConfig
from pomscale.config.load import load_experiment, load_train_recipe, read_recipe_source
from pomscale.config.shipped import recipe_file
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError, override


@dataclass(frozen=True)
class Training:
    """One training run. words are those after `pomscale`; needs are names of the trainings that it begins with."""

    name: str
    recipe_file: str
    overrides: list[str]
    recipe: TrainRecipe
    needs: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output, self.recipe.name)

    @property
    def words(self) -> list[str]:
        return ["train", self.recipe_file, *self.overrides]


@dataclass(frozen=True)
class Point:
    """One point of the grid with one seed.

    values are names of values by axis, trainings those of the recipe by their name there, commands the words of each.
    """

    name: str
    values: dict[str, str]
    seed: int
    folder: Path
    trainings: dict[str, Training]
    commands: list[list[str]]


@dataclass(frozen=True)
class Experiment:
    """An experiment and everything it consists of. file, overrides and small are as it was asked for."""

    recipe: ExperimentRecipe
    file: Path
    overrides: list[str] = field(default_factory=list)
    small: bool = False
    trainings: list[Training] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output, self.recipe.name)

    @property
    def command(self) -> list[str]:
        """The words that make this experiment, without `pomscale`."""
        return ["experiment", str(self.file), *(["--small"] if self.small else []), *self.overrides]


def read_experiment(path: str | Path, overrides: list[str] | None = None, *, small: bool = False) -> Experiment:
    """Read an experiment and expand its grid.

    Raises RecipeError, which lists every problem, for a recipe that is wrong, or a point whose training recipe is.
    """
    recipe = load_experiment(path, overrides, small=small)
    folder = recipe_file(path).parent
    trainings: dict[str, Training] = {}
    points: list[Point] = []
    problems: dict[str, str] = {}
    for labels in itertools.product(*(axis.labels for axis in recipe.axes.values())):
        values = dict(zip(recipe.axes, labels, strict=True))
        for seed in recipe.seeds:
            try:
                points.append(_Expansion(recipe, folder, values, seed, trainings).point())
            except RecipeError as error:
                for problem in error.problems:
                    problems.setdefault(problem, _name(recipe, values))
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise RecipeError([f"{path}: axes: {count} points would be called {name}; name the values differently"])
    if problems:
        raise RecipeError([f"{problem} (experiment {path}: {where})" for problem, where in problems.items()])
    return Experiment(recipe, Path(path), list(overrides or []), small, list(trainings.values()), points)


@dataclass
class _Expansion:
    """Expansion of one point; `trainings` are all that are known, by name, and new ones are added."""

    recipe: ExperimentRecipe
    folder: Path
    values: dict[str, str]
    seed: int
    trainings: dict[str, Training]

    def point(self) -> Point:
        own: dict[str, Training] = {}
        for name, config in self.recipe.trainings.items():
            own[name] = self._training(name, config, own)
        name = _name(self.recipe, {**self.values, "seed": str(self.seed)})
        folder = Path(self.recipe.output, self.recipe.name, "points", name)
        known = {"seed": str(self.seed), "folder": str(folder)} | {key: str(one.folder) for key, one in own.items()}
        axes = {axis: self.recipe.axes[axis].words(label) for axis, label in self.values.items()}
        commands = [_fill_command(command, known, axes) for command in self.recipe.run]
        return Point(name, self.values, self.seed, folder, own, commands)

    def _training(self, name: str, config: ExperimentTrainingConfig, before: Mapping[str, Training]) -> Training:
        axes = self._changing_axes(name)
        values = {axis: self.values[axis] for axis in axes}
        full_name = _name(self.recipe, {name: "", **values, "seed": str(self.seed)})
        if full_name in self.trainings:
            return self.trainings[full_name]
        folders = {key: str(one.folder) for key, one in before.items()}
        overrides = [_fill(text, folders) for text in config.overrides]
        for axis, axis_config in self.recipe.axes_of(name).items():
            fields = axis_config.fields(self.values[axis])
            overrides += [_override(key, value, folders) for key, value in fields.items()]
        needs = [before[key].name for key in before if any(folders[key] in text for text in overrides)]
        output = Path(self.recipe.output, self.recipe.name, "runs")
        overrides += [f"seed={self.seed}", override("output", str(output)), override("name", full_name)]
        file = _find(self.folder, config.recipe)
        kind = read_recipe_source(file).values.get("kind")
        if kind != "train":
            raise RecipeError([f"{file}: kind: trainings.{name} needs a recipe of kind train, and this one is {kind}"])
        self.trainings[full_name] = Training(full_name, file, overrides, load_train_recipe(file, overrides), needs)
        return self.trainings[full_name]

    def _changing_axes(self, training: str) -> list[str]:
        """Return the axes on whose values a training depends, also through those that it begins with."""
        axes = set(self.recipe.axes_of(training))
        for needed in {key for text in self.recipe.texts(training) for key in PLACEHOLDER.findall(text)}:
            axes |= set(self._changing_axes(needed))
        return [name for name in self.recipe.axes if name in axes]


def _find(folder: Path, recipe: str) -> str:
    """Return the file of a recipe as a user in this folder would name it, or the name of a shipped one."""
    beside = folder / recipe
    if not beside.is_file():
        return recipe
    here = Path.cwd().resolve()
    resolved = beside.resolve()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)


def _fill(text: str, known: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: known.get(found[1], found[0]), text)


def _fill_command(command: str, known: Mapping[str, str], axes: Mapping[str, str]) -> list[str]:
    """Return the words of a command; an axis that is a word by itself may stand for several."""
    words: list[str] = []
    for word in shlex.split(command):
        alone = PLACEHOLDER.fullmatch(word)
        if alone and alone[1] in axes:
            words += shlex.split(axes[alone[1]])
        else:
            words.append(_fill(word, {**axes, **known}))
    return words


def _override(key: str, value: Any, folders: Mapping[str, str]) -> str:
    return override(key, _fill(value, folders)) if isinstance(value, str) else f"{key}={json.dumps(value)}"


def _name(recipe: ExperimentRecipe, parts: Mapping[str, str]) -> str:
    """Return the name of a folder and of a pipeline's stage from names and values."""
    words = []
    for key, value in parts.items():
        known = folder_words(recipe.axes[key].labels if key in recipe.axes else [value], strip="_.-")
        words.append(f"{key}-{known[value]}" if value else key)
    return shortened(".".join(words), MAX_NAME_BYTES // 2)
