"""Recipes of kind `pipeline`: several jobs in order, e.g. encode -> verify -> train -> sample -> evaluate."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pomscale.config.cluster import TimeLimit
from pomscale.config.section import FolderName, Section

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill_in(command: str, homes: Mapping[str, Path]) -> list[str]:
    """Return the words of a stage's command, each {STAGE} replaced by the folder of that stage."""
    return [_PLACEHOLDER.sub(lambda found: str(homes[found[1]]), word) for word in shlex.split(command)]


class StageConfig(Section):
    """One job, or one array of jobs."""

    name: FolderName = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    recipe: str | None = Field(None, description="Recipe to train or encode, relative to this file.")
    overrides: list[str] = Field([], description="Changes to the recipe, a.b=c.")
    run: list[str] = Field(
        [],
        description="Commands of `pomscale` instead of a recipe, one after another: 'data verify data/x'. {STAGE} is "
        "the folder of this stage or of one before it; that of a stage that trains is its run folder.",
    )
    after: dict[str, Literal["ok", "any"]] | None = Field(
        None,
        description="Stages to wait for: ok = to succeed, any = to end. null = the stage before, ok.",
    )
    array: PositiveInt | None = Field(None, description="Number of tasks that share an encode.")
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt | None = Field(None, description="GPUs per node; null = the profile's; 0 = none.")
    ranks_per_node: PositiveInt | None = Field(None, description="Ranks per node without GPUs; null = the profile's.")
    time_limit: TimeLimit | None = Field(None, description="Time limit; null = the profile's.")

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if (self.recipe is None) == (not self.run):
            raise ValueError("give either `recipe` or `run`")
        if self.overrides and self.recipe is None:
            raise ValueError("overrides: only a recipe has something to change")
        return self


class PipelineRecipe(Section):
    """Stages in order; a stage may wait for any before it."""

    kind: Literal["pipeline"]
    name: FolderName = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Folder: output/name.")
    output: str = Field("pipelines", description="Folder of pipelines: jobs, logs, verdicts of their stages.")
    stages: list[StageConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> PipelineRecipe:
        known: list[str] = []
        for stage in self.stages:
            if stage.name in known:
                raise ValueError(f"stages: {stage.name!r} is there twice")
            for name in stage.after or {}:
                if name not in known:
                    raise ValueError(f"stages: {stage.name} waits for {name!r}, which is no stage before it")
            known.append(stage.name)
            for command in stage.run:
                try:
                    shlex.split(command)
                except ValueError as error:
                    raise ValueError(f"stages: {stage.name}: {command!r}: {error}") from None
                wrong = [name for name in _PLACEHOLDER.findall(command) if name not in known]
                if wrong:
                    raise ValueError(f"stages: {stage.name}: {command!r}: {{{wrong[0]}}} is no stage up to this one")
        return self

    def waits_for(self, stage: StageConfig) -> dict[str, Literal["ok", "any"]]:
        """Return the stages that `stage` waits for -> whether they must have succeeded (ok) or only ended (any)."""
        if stage.after is not None:
            return stage.after
        index = self.stages.index(stage)
        return {self.stages[index - 1].name: "ok"} if index else {}
