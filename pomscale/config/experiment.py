"""Recipes of kind `experiment`: a grid of runs, or of commands, that ends in a table and a plot."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pomscale.config.section import FolderName, Section, Seed

PLACEHOLDER = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
"""Name in braces. Tables such as `{kind: pom}` and `{}` are none."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_RESERVED = ("seed", "folder")


class ExperimentTrainingConfig(Section):
    """A training run of every point of the grid. Points that agree in all that changes the run share it."""

    recipe: str = Field(description="Recipe of kind train, relative to this file, or the name of a shipped one.")
    overrides: list[str] = Field(
        [], description="Changes to the recipe, a.b=c; {TRAINING} is the run folder of a training before this one."
    )


class AxisConfig(Section):
    """An axis of the grid, and what its values change."""

    field: str | None = Field(
        None, description="Dotted field of the training recipes that takes the values; null = commands alone use them."
    )
    values: list[Any] | dict[str, str | dict[str, Any]] = Field(
        description="Values; or name -> fields of the training recipes that it sets; or name -> words of commands."
    )
    of: list[str] | None = Field(None, description="Trainings that the fields belong to; null = all.")

    @model_validator(mode="after")
    def _check(self) -> AxisConfig:
        if not self.values:
            raise ValueError("values: there must be at least one")
        if self.field is not None and isinstance(self.values, dict):
            raise ValueError("field: belongs to a list of values; a table of values names its fields itself")
        if doubled := [name for name, count in Counter(self.labels).items() if count > 1]:
            raise ValueError(f"values: two of them are called {doubled[0]!r}; give a table with a name for each")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the values."""
        return list(self.values) if isinstance(self.values, dict) else [label(value) for value in self.values]

    def fields(self, name: str) -> dict[str, Any]:
        """Return dotted field -> value of the training recipes at the value called `name`."""
        if isinstance(self.values, dict):
            found = self.values[name]
            return found if isinstance(found, dict) else {}
        return {} if self.field is None else {self.field: self.values[self.labels.index(name)]}

    def words(self, name: str) -> str:
        """Return what stands for the axis in commands at the value called `name`."""
        found = self.values[name] if isinstance(self.values, dict) else name
        return found if isinstance(found, str) else name

    def number(self, name: str) -> float | None:
        """Return the number that the value called `name` is, or None."""
        try:
            return float(name)
        except ValueError:
            return None


def label(value: Any) -> str:
    """Return the name of a value in a list of values."""
    return value if isinstance(value, str) else re.sub(r"[\[\]{}\" ]", "", repr(value)).replace("'", "")


class MeasureConfig(Section):
    """A named figure of a point of the grid: from a run's metrics, from a JSON file, or from the recipe."""

    label: str | None = Field(None, description="Heading in table and plot; null = the name.")
    metric: str | None = Field(None, description="Metric of the run, e.g. validation/loss: its last value.")
    file: str | None = Field(None, description="JSON file in the point's folder that the commands leave.")
    key: str | None = Field(None, description="Dotted key in the JSON file, e.g. metrics.fid or rows.0.forward_s.")
    plan: Literal["parameters", "training_flops", "state"] | None = Field(
        None,
        description="Figure of the recipe: parameters; FLOPs of the whole training; numbers in the largest state of a "
        "PoM mixer.",
    )
    of: str | None = Field(None, description="Training that `metric` and `plan` belong to; null = the last.")
    format: str = Field(".4g", description="Format of the figure in tables, as Python has them: .1%, .4f.")

    @model_validator(mode="after")
    def _check(self) -> MeasureConfig:
        if sum(source is not None for source in (self.metric, self.file, self.plan)) != 1:
            raise ValueError("give exactly one of `metric`, `file`, `plan`")
        if (self.file is None) != (self.key is None):
            raise ValueError("key: belongs to `file`, and a file needs one")
        return self

    @field_validator("format")
    @classmethod
    def _is_a_format(cls, text: str) -> str:
        try:
            format(1.0, text)
        except ValueError as error:
            raise ValueError(f"{text!r} formats no number: {error}") from None
        return text


class PlotConfig(Section):
    """Plot of the experiment: one panel for each measure of `y`."""

    x: str = Field(description="Axis or measure along which points are drawn.")
    y: list[str] = Field(min_length=1, description="Measures.")
    lines: list[str] | None = Field(
        None, description="Axes whose values are lines of their own; null = all but `x`, where that is an axis."
    )
    log_x: bool = False
    log_y: bool = False


class ExperimentRecipe(Section):
    """Trainings and commands over a grid and several seeds, with the figures to read and to draw."""

    kind: Literal["experiment"]
    name: FolderName = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Folder: output/name.")
    title: str = Field("", description="Heading of table and plot.")
    output: str = Field("experiments", description="Folder of experiments: runs, figures, tables and plots.")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="Every point of the grid is made with each.")
    prepare: list[str] = Field(
        [],
        description="Commands that make the data, run once on this machine: words of `pomscale`, or `-m MODULE ...`.",
    )
    trainings: dict[str, ExperimentTrainingConfig] = Field(
        {}, description="Name -> training run; a later one may begin with the weights of an earlier one."
    )
    ranks: PositiveInt = Field(1, description="Processes of a training on this machine, by torchrun.")
    nodes: PositiveInt = Field(1, description="Nodes of a training's job, with --cluster.")
    axes: dict[str, AxisConfig] = Field({}, description="Name -> axis of the grid; the last one changes fastest.")
    run: list[str] = Field(
        [],
        description="Commands of every point after its trainings: words of `pomscale`, or `-m MODULE ...`. {TRAINING} "
        "is a run folder, {AXIS} a value, {seed} the seed, {folder} the point's own folder.",
    )
    measures: dict[str, MeasureConfig] = Field(min_length=1, description="Name -> figure of a point.")
    table: list[str] = Field([], description="Measures in the table; [] = all.")
    plot: PlotConfig
    small: dict[str, Any] = Field(
        {}, description="Fields of this recipe that are otherwise with --small, each as a whole: minutes on a laptop."
    )

    @model_validator(mode="after")
    def _check(self) -> ExperimentRecipe:
        if not self.trainings and not self.run:
            raise ValueError("run: without trainings there must be commands")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one of them is there twice")
        for section in ("trainings", "axes", "measures"):
            if wrong := [name for name in getattr(self, section) if not _NAME.fullmatch(name)]:
                raise ValueError(f"{section}: {wrong[0]!r} is no name; use letters, digits and _, a letter first")
        names = [*_RESERVED, *self.trainings, *self.axes]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"axes: {doubled[0]!r} is already the name of something else in commands")
        self._check_axes()
        self._check_placeholders()
        self._check_measures()
        return self

    def _check_axes(self) -> None:
        for name, axis in self.axes.items():
            _check_known(f"axes.{name}.of", axis.of or [], self.trainings, "training")
            if not self.trainings and any(axis.fields(label) for label in axis.labels):
                raise ValueError(f"axes.{name}: sets fields of training recipes, and there are no trainings")

    def _check_placeholders(self) -> None:
        known = [*_RESERVED, *self.trainings, *self.axes]
        for command in [*self.prepare, *self.run]:
            try:
                words = shlex.split(command)
            except ValueError as error:
                raise ValueError(f"run: {command!r}: {error}") from None
            if not words:
                raise ValueError("run: a command is empty")
            _check_known(f"run: {command!r}", PLACEHOLDER.findall(command), known, "placeholder")
        for command in self.prepare:
            if PLACEHOLDER.search(command):
                raise ValueError(f"prepare: {command!r}: is run once, so there is no point to fill in")
        before: list[str] = []
        for name in self.trainings:
            for text in self.texts(name):
                _check_known(f"trainings.{name}: {text!r}", PLACEHOLDER.findall(text), before, "training before it")
            before.append(name)

    def _check_measures(self) -> None:
        for name, measure in self.measures.items():
            if measure.file is None and not self.trainings:
                raise ValueError(f"measures.{name}: there is no training to take it from; give a `file`")
            _check_known(f"measures.{name}.of", [measure.of] if measure.of else [], self.trainings, "training")
        _check_known("table", self.table, self.measures, "measure")
        _check_known("plot.y", self.plot.y, self.measures, "measure")
        _check_known("plot.x", [self.plot.x], [*self.axes, *self.measures], "axis or measure")
        _check_known("plot.lines", self.plot.lines or [], self.axes, "axis")

    def axes_of(self, training: str) -> dict[str, AxisConfig]:
        """Return the axes that set fields of a training."""
        return {
            name: axis
            for name, axis in self.axes.items()
            if (axis.of is None or training in axis.of) and any(axis.fields(label) for label in axis.labels)
        }

    def texts(self, training: str) -> list[str]:
        """Return the overrides of a training and the texts among the values that axes set in it."""
        axes = self.axes_of(training).values()
        values = [value for axis in axes for label in axis.labels for value in axis.fields(label).values()]
        return [*self.trainings[training].overrides, *(value for value in values if isinstance(value, str))]

    @property
    def lines(self) -> list[str]:
        """Axes whose values are lines of the plot."""
        if self.plot.lines is not None:
            return self.plot.lines
        return [name for name in self.axes if name != self.plot.x]


def _check_known(where: str, names: Iterable[str], known: Iterable[str] | Mapping[str, Any], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            listed = ", ".join(known) if known else "none"
            raise ValueError(f"{where}: {name!r} is no {what} here; known: {listed}")
