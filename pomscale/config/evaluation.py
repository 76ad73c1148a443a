"""Evaluations of checkpoints beside training, each as a job of its own."""

from __future__ import annotations

import shlex
from string import Formatter

from pydantic import Field, PositiveInt, field_validator

from pomscale.config.cluster import TimeLimit
from pomscale.config.section import FolderName, Section

FIGURES = "figures.json"
_PLACEHOLDERS = ("checkpoint", "samples", "folder")


class EvaluationConfig(Section):
    """Commands over one checkpoint, by one process with one GPU (where the cluster has any).

    The last command writes {folder}/figures.json; its figures go to the run's own record.
    """

    name: FolderName = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Figures are logged as evaluation/NAME/FIGURE."
    )
    every_samples: PositiveInt = Field(description="Evaluate the first complete checkpoint after each multiple.")
    run: list[str] = Field(
        min_length=1,
        description="Commands of `pomscale` with {checkpoint}, {samples} and {folder} filled in. Pictures and videos "
        "that they leave in {folder} are logged too.",
    )
    time_limit: TimeLimit | None = Field(None, description="Time limit, if not that of the run's job.")

    @field_validator("run")
    @classmethod
    def _known_placeholders(cls, run: list[str]) -> list[str]:
        for command in run:
            try:
                shlex.split(command)
                names = [name for _, name, _, _ in Formatter().parse(command) if name is not None]
            except ValueError as error:
                raise ValueError(f"{command!r}: {error}") from None
            wrong = [name for name in names if name not in _PLACEHOLDERS]
            if wrong:
                raise ValueError(f"{command!r}: {{{wrong[0]}}} is none of {{checkpoint}}, {{samples}}, {{folder}}")
        if f"{{folder}}/{FIGURES}" not in run[-1]:
            raise ValueError(f"the last command writes the figures: it must name {{folder}}/{FIGURES}")
        return run
