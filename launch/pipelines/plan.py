"""What is to be done about each stage of a pipeline: nothing, or a job that has been checked. Writes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.pipelines.file import PIPELINE_FILE, Pipeline, Stage, read_pipeline
from launch.record.state import ended, is_success
from launch.scheduler import slurm
from launch.submission.checks import has_finished
from launch.submission.prepare import Prepared, in_queue, prepare_commands, prepare_encode, prepare_train, run_home
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import load_recipe
from pomscale.config.pipeline import PipelineRecipe, StageConfig, fill_in
from pomscale.config.train import TrainRecipe


@dataclass(frozen=True)
class Planned:
    """A stage, and what is to be done about it. prepared: None where nothing is. job_id: of one that waits or runs.

    replaces: a job that still waits for a stage that is submitted again.
    """

    config: StageConfig
    record: Stage
    state: str
    prepared: Prepared | None = None
    job_id: str | None = None
    replaces: str | None = None


class Plan:
    """Goes through the stages in order and knows what became of those before."""

    def __init__(
        self,
        recipe: PipelineRecipe,
        path: Path,
        folder: Path,
        profile: ClusterProfile,
        cluster_name: str,
        command_line: list[str],
        check_command: Callable[[list[str]], None],
    ) -> None:
        self._recipe = recipe
        self._path = path
        self.folder = folder
        self.profile = profile
        self.cluster_name = cluster_name
        self._command_line = command_line
        self._check_command = check_command
        earlier = read_pipeline(folder).stages if (folder / PIPELINE_FILE).is_file() else []
        self._made_from = {stage.name: stage.made_from for stage in earlier}  # as last submitted
        self._planned: dict[str, Planned] = {}
        self._makes: dict[str, set[Path]] = {}  # by stage: what it, and those that it waits for, will make

    def add(self, stage: StageConfig) -> Planned:
        """InputError, naming the stage, for whatever is wrong with it."""
        try:
            planned = self._add(stage)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
        self._planned[stage.name] = planned
        return planned

    def pipeline(self, submitted: Collection[str]) -> Pipeline:
        """For pipeline.json. A stage that was to be submitted, and is not in `submitted`, is still what it was."""
        stages = [
            replace(stage.record, made_from=self._made_from.get(name, ""))
            if stage.prepared is not None and name not in submitted
            else stage.record
            for name, stage in self._planned.items()
        ]
        return Pipeline(self._recipe.name, self.cluster_name, self._command_line, str(Path.cwd()), stages)

    def _add(self, stage: StageConfig) -> Planned:
        recipe = self._stage_recipe(stage)
        home = self._home(stage, recipe)
        homes = {name: Path(planned.record.home) for name, planned in self._planned.items()} | {stage.name: home}
        commands = [fill_in(command, homes) for command in stage.run]
        for words in commands:
            self._check_command(words)
        after = self._recipe.waits_for(stage)
        made_from = recipe.model_dump(mode="json") if recipe is not None else commands
        record = Stage(stage.name, str(home), dict(after), _checksum(made_from))
        to_come = set().union(*(self._makes[name] for name in after))
        planned = self._decide(stage, record, recipe, commands, to_come)
        if planned.prepared is not None:
            planned.prepared.script()  # refuses here, before the first is submitted, what submit() would refuse
        self._makes[stage.name] = to_come | (_products(home, recipe, commands) if planned.state != "done" else set())
        return planned

    def _stage_recipe(self, stage: StageConfig) -> TrainRecipe | EncodeRecipe | None:
        if stage.recipe is None:
            return None
        recipe = load_recipe(self._path.parent / stage.recipe, stage.overrides)
        if isinstance(recipe, PipelineRecipe):
            raise InputError(f"recipe: {stage.recipe} is a pipeline itself; name what to train or to encode")
        if stage.array is not None and not isinstance(recipe, EncodeRecipe):
            raise InputError(f"array: only an encode is shared by several tasks, and {stage.recipe} is none")
        return recipe

    def _home(self, stage: StageConfig, recipe: TrainRecipe | EncodeRecipe | None) -> Path:
        home = run_home(recipe, self.profile) if isinstance(recipe, TrainRecipe) else self.folder / stage.name
        for other in self._planned.values():
            if Path(other.record.home) == home:
                raise InputError(f"trains in {home}, as stage {other.config.name} does; give it a name: name=...")
        return home

    def _decide(
        self,
        stage: StageConfig,
        record: Stage,
        recipe: TrainRecipe | EncodeRecipe | None,
        commands: list[list[str]],
        to_come: set[Path],
    ) -> Planned:
        home = Path(record.home)
        queued = in_queue(home)
        again = [name for name in record.after if self._planned[name].prepared is not None]
        is_same = self._made_from.get(stage.name) == record.made_from
        if queued is None:
            if is_same and not again and _is_done(home, recipe):
                return Planned(stage, record, "done")
            return Planned(stage, record, "new", self._prepare(stage, home, recipe, commands, to_come))
        if not is_same:
            raise InputError(f"job {queued.job_id} is at work on what this stage was before; cancel it first")
        if not again:
            return Planned(stage, record, "in the queue", job_id=queued.job_id)
        if queued.scheduler != "slurm" or slurm.state_now(queued.job_id) != "PENDING":
            raise InputError(f"job {queued.job_id} runs, although stage {again[0]} must run again; cancel it first")
        prepared = self._prepare(stage, home, recipe, commands, to_come, replacing=True)
        return Planned(stage, record, "new", prepared, replaces=queued.job_id)

    def _prepare(
        self,
        stage: StageConfig,
        home: Path,
        recipe: TrainRecipe | EncodeRecipe | None,
        commands: list[list[str]],
        to_come: set[Path],
        *,
        replacing: bool = False,
    ) -> Prepared:
        how: dict[str, Any] = {
            "num_nodes": stage.nodes,
            "gpus_per_node": stage.gpus_per_node,
            "ranks_per_node": stage.ranks_per_node,
            "time_limit": stage.time_limit,
            "command_line": self._command_line,
            "replacing": replacing,
        }
        on = (self.profile, self.cluster_name)
        if recipe is None or stage.recipe is None:
            if stage.ranks_per_node is None and not stage.gpus_per_node:  # one process, unless the stage asks for more
                how["gpus_per_node"] = min(self.profile.gpus_per_node, 1) if stage.gpus_per_node is None else 0
                how["ranks_per_node"] = 1
            return prepare_commands(f"{self._recipe.name}-{stage.name}", home, commands, *on, **how)
        path = self._path.parent / stage.recipe
        if isinstance(recipe, TrainRecipe):
            return prepare_train(path, stage.overrides, *on, to_come=to_come, **how)
        return prepare_encode(path, stage.overrides, *on, array=stage.array, home=home, to_come=to_come, **how)


def _is_done(home: Path, recipe: TrainRecipe | EncodeRecipe | None) -> bool:
    """Also a run that somebody has brought to its end by hand."""
    verdict = ended(home)
    return (verdict is not None and is_success(verdict)) or (
        isinstance(recipe, TrainRecipe) and has_finished(home, recipe)
    )


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _products(home: Path, recipe: TrainRecipe | EncodeRecipe | None, commands: Sequence[Sequence[str]]) -> set[Path]:
    """Datasets and run folders that will be there once the stage has succeeded."""
    if isinstance(recipe, TrainRecipe):
        return {home}
    if recipe is not None:
        return {Path(recipe.output).absolute()}
    made = []
    for words in commands:
        if words[:2] == ["data", "merge"] and "--out" in words[:-1]:
            made.append(words[words.index("--out") + 1])
        if words[:2] == ["data", "split"]:
            made += [word.rpartition("=")[0] for word in words[3:] if "=" in word]
    return {Path(folder).absolute() for folder in made}
