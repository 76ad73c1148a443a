"""Plan of a pipeline: for each stage either nothing to do, or a job that has been checked. Nothing is written here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from launch.record.pipeline import PIPELINE_FILE, Pipeline, Stage, read_pipeline
from launch.record.result import final_verdict, is_success
from launch.scheduler import slurm
from launch.submission.checks import has_finished
from launch.submission.prepare import (
    JobRequest,
    in_queue,
    prepare_commands,
    prepare_encode,
    prepare_train,
    run_folder,
)
from launch.submission.prepared import Prepared
from pomscale.base.errors import InputError
from pomscale.config.encode import EncodeRecipe
from pomscale.config.experiment import ExperimentRecipe
from pomscale.config.load import load_recipe
from pomscale.config.pipeline import PipelineRecipe, StageConfig, fill_in
from pomscale.config.train import TrainRecipe


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and what is to be done about it.

    prepared: the job to submit; None if nothing is to be done. job_id: of a job that waits or runs already. replaces:
    id of a job to cancel, which still waits for a stage that is submitted again.
    """

    config: StageConfig
    record: Stage
    state: str
    prepared: Prepared | None = None
    job_id: str | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class _StageWork:
    """Work of a stage. recipe: None for a stage of commands. to_come: what the stages before it will make."""

    config: StageConfig
    job_folder: Path
    recipe: TrainRecipe | EncodeRecipe | None
    commands: list[list[str]]
    to_come: set[Path]

    def checksum(self) -> str:
        content = self.recipe.model_dump(mode="json") if self.recipe is not None else self.commands
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether its job has succeeded, or its run was finished by hand."""
        verdict = final_verdict(self.job_folder)
        return (verdict is not None and is_success(verdict)) or (
            isinstance(self.recipe, TrainRecipe) and has_finished(self.job_folder, self.recipe)
        )

    def products(self) -> set[Path]:
        """Return the datasets and run folders that will exist once the stage has succeeded."""
        if isinstance(self.recipe, TrainRecipe):
            return {self.job_folder}
        if self.recipe is not None:
            return {Path(self.recipe.output).absolute()}
        made = []
        for words in self.commands:
            if words[:2] == ["data", "merge"] and "--out" in words[:-1]:
                made.append(words[words.index("--out") + 1])
            if words[:2] == ["data", "split"]:
                made += [word.rpartition("=")[0] for word in words[3:] if "=" in word]
        return {Path(folder).absolute() for folder in made}


class PipelinePlan:
    """Plan of a pipeline. The stages are added in order, since a stage depends on what becomes of those before it."""

    def __init__(
        self,
        recipe: PipelineRecipe,
        path: Path,
        folder: Path,
        request: JobRequest,
        check_command: Callable[[list[str]], None],
    ) -> None:
        """Read what was launched before, if anything was.

        Args:
            recipe: The pipeline.
            path: File of the recipe; recipes of its stages are relative to it.
            folder: Folder of the pipeline.
            request: Cluster and command line; each stage says the rest for itself.
            check_command: Raises InputError for words that are no command of pomscale.
        """
        self._recipe = recipe
        self._path = path
        self.folder = folder
        self._request = request
        self._check_command = check_command
        earlier = read_pipeline(folder).stages if (folder / PIPELINE_FILE).is_file() else []
        self._made_from = {stage.name: stage.made_from for stage in earlier}  # as last submitted
        self._planned: dict[str, PlannedStage] = {}
        self._makes: dict[str, set[Path]] = {}  # by stage: what it and the stages that it waits for will make

    def add(self, stage: StageConfig) -> PlannedStage:
        """Plan the next stage. InputError, naming the stage, if anything is wrong with it."""
        try:
            planned = self._add(stage)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
        self._planned[stage.name] = planned
        return planned

    def pipeline(self, submitted: Collection[str]) -> Pipeline:
        """Return the content of pipeline.json, given the names of the stages that have been submitted.

        A stage that was to be submitted and was not is recorded as what it was before.
        """
        stages = [
            replace(stage.record, made_from=self._made_from.get(name, ""))
            if stage.prepared is not None and name not in submitted
            else stage.record
            for name, stage in self._planned.items()
        ]
        request = self._request
        return Pipeline(self._recipe.name, request.cluster_name, list(request.command_line), str(Path.cwd()), stages)

    def _add(self, stage: StageConfig) -> PlannedStage:
        recipe = self._stage_recipe(stage)
        job_folder = self._job_folder(stage, recipe)
        job_folders = {name: Path(planned.record.job_folder) for name, planned in self._planned.items()}
        commands = [fill_in(command, job_folders | {stage.name: job_folder}) for command in stage.run]
        for words in commands:
            self._check_command(words)
        after = self._recipe.waits_for(stage)
        to_come = set().union(*(self._makes[name] for name in after))
        work = _StageWork(stage, job_folder, recipe, commands, to_come)
        planned = self._decide(work, Stage(stage.name, str(job_folder), dict(after), work.checksum()))
        if planned.prepared is not None:
            planned.prepared.script()  # refuses here, before the first is submitted, what submit() would refuse
        self._makes[stage.name] = to_come | (work.products() if planned.state != "done" else set())
        return planned

    def _stage_recipe(self, stage: StageConfig) -> TrainRecipe | EncodeRecipe | None:
        if stage.recipe is None:
            return None
        recipe = load_recipe(self._path.parent / stage.recipe, stage.overrides)
        if isinstance(recipe, PipelineRecipe | ExperimentRecipe):
            what = "a pipeline" if isinstance(recipe, PipelineRecipe) else "an experiment"
            raise InputError(f"recipe: {stage.recipe} is {what} itself; name what to train or to encode")
        if stage.array is not None and not isinstance(recipe, EncodeRecipe):
            raise InputError(f"array: only an encode is shared by several tasks, and {stage.recipe} is none")
        return recipe

    def _job_folder(self, stage: StageConfig, recipe: TrainRecipe | EncodeRecipe | None) -> Path:
        if isinstance(recipe, TrainRecipe):
            job_folder = run_folder(recipe, self._request.profile)
        else:
            job_folder = self.folder / stage.name
        for other in self._planned.values():
            if Path(other.record.job_folder) == job_folder:
                raise InputError(f"trains in {job_folder}, as stage {other.config.name} does; give it a name: name=...")
        return job_folder

    def _decide(self, work: _StageWork, record: Stage) -> PlannedStage:
        stage = work.config
        queued = in_queue(work.job_folder)
        again = [name for name in record.after if self._planned[name].prepared is not None]
        is_same = self._made_from.get(stage.name) == record.made_from
        if queued is None:
            if is_same and not again and work.is_done():
                return PlannedStage(stage, record, "done")
            return PlannedStage(stage, record, "new", self._prepare(work))
        if not is_same:
            raise InputError(f"job {queued.job_id} still works on an earlier version of this stage; cancel it first")
        if not again:
            return PlannedStage(stage, record, "in the queue", job_id=queued.job_id)
        if queued.scheduler != "slurm" or not slurm.has_not_begun(queued.job_id):
            raise InputError(f"job {queued.job_id} runs, although stage {again[0]} must run again; cancel it first")
        prepared = self._prepare(work, replacing=True)
        return PlannedStage(stage, record, "new", prepared, replaces=queued.job_id)

    def _prepare(self, work: _StageWork, *, replacing: bool = False) -> Prepared:
        stage = work.config
        request = replace(
            self._request,
            num_nodes=stage.nodes,
            gpus_per_node=stage.gpus_per_node,
            ranks_per_node=stage.ranks_per_node,
            time_limit=stage.time_limit,
            to_come=work.to_come,
            replacing=replacing,
        )
        if work.recipe is None or stage.recipe is None:
            if stage.ranks_per_node is None and not stage.gpus_per_node:  # one process, unless the stage asks for more
                num_gpus = min(request.profile.gpus_per_node, 1) if stage.gpus_per_node is None else 0
                request = replace(request, gpus_per_node=num_gpus, ranks_per_node=1)
            return prepare_commands(f"{self._recipe.name}-{stage.name}", work.job_folder, work.commands, request)
        path = self._path.parent / stage.recipe
        if isinstance(work.recipe, TrainRecipe):
            return prepare_train(path, stage.overrides, request)
        return prepare_encode(path, stage.overrides, request, array=stage.array, job_folder=work.job_folder)
