"""`pomscale evaluate images RUN --every N --cluster P`: the checkpoints of a run, each evaluated by a job of its own.

The job folders are those of a recipe's evaluations (launch.node.evaluations), so that the record of what was submitted
is on disk: the same command goes on where it was ended, and submits nothing twice.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.evaluation_job import prepare_evaluation
from launch.node.evaluations import (
    due_checkpoints,
    evaluation_folder,
    give_up_failed,
    is_started,
    job_folders,
)
from launch.record.job import JobSpec
from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.submission.prepare import JobRequest
from pomscale.base.console import say, warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.load import load_train_recipe
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, is_complete, link, remove, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER, EVALUATED_FOLDER, FAILED_FILE, JOB_FILE, RECIPE_FILE

_LOOK_EVERY_S = 30.0


@dataclass
class CheckpointEvaluation:
    """An evaluation of the checkpoints of a run, which was not asked for in its recipe.

    run: the run folder. config: its name, its interval and its commands. request: where the jobs shall run. check:
    called before anything is submitted, and again once there is a checkpoint; raises InputError for what a job would
    end with. submitted: job folders of the jobs that this object has submitted.
    """

    run: Path
    config: EvaluationConfig
    request: JobRequest
    check: Callable[[], None] = lambda: None
    submitted: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise InputError if it is no run folder, or if the name stands for another evaluation of it."""
        self.run = self.run.resolve()
        if not (self.run / RECIPE_FILE).is_file():
            raise InputError(f"{self.run}: no run folder: it has no {RECIPE_FILE}; --every is for runs")
        name = self.config.name
        if any(name == other.name for other in load_train_recipe(self.run / RECIPE_FILE).evaluations):
            raise InputError(
                f"{self.run}: its recipe has an evaluation {name}, which the run itself starts; give another name"
            )
        give_up_failed(job_folders(self.run, name))
        for job_folder in job_folders(self.run, name):
            if (job_folder / JOB_FILE).is_file() and not (job_folder / FAILED_FILE).is_file():
                self._check_same(job_folder)

    def _check_same(self, job_folder: Path) -> None:
        """Check that this evaluation was asked for with the same commands before: its figures lie on one curve."""
        spec = JobSpec.read(job_folder / JOB_FILE)
        # The run may have been moved since.
        before = [[word.replace(spec.job_folder, "{folder}") for word in words] for words in spec.commands[:-1]]
        checkpoint = f"{{folder}}/{EVALUATED_FOLDER}"
        filled = {"checkpoint": checkpoint, "samples": samples_of(job_folder), "folder": "{folder}"}
        now = [[word.format(**filled) for word in shlex.split(command)] for command in self.config.run]
        if before != now:
            raise InputError(
                f"{self.run}: evaluation {self.config.name} was asked for with other options: "
                f"{'; '.join(map(shlex.join, before))}; give another name"
            )

    def follow(self) -> int:
        """Submit what is due until the run has ended, or once in a dry run. Return the number of jobs.

        Raises InputError if a job is refused, or would end with one. While SLURM does not answer a live run is looked
        at again.
        """
        self.check()
        has_checked = bool(complete_checkpoints(self.run / CHECKPOINTS_FOLDER))
        self._submit_all(self._failed_before())
        while True:
            is_live = summarize({self.run: self.run.name}).runs[0].state in LIVE
            due = due_checkpoints(self.run, self.config, finished=not is_live)
            if due and not has_checked:
                self.check()
                has_checked = True
            self._submit_all(due, is_live=is_live)
            if self.request.dry_run or not is_live:
                return len(self.submitted)
            time.sleep(_LOOK_EVERY_S)

    def _failed_before(self) -> list[Path]:
        """Return the checkpoints that are still there and whose evaluation has failed: a person asks for it again."""
        failed = [folder for folder in job_folders(self.run, self.config.name) if (folder / FAILED_FILE).is_file()]
        checkpoints = [final_folder(self.run / CHECKPOINTS_FOLDER, samples_of(folder)) for folder in failed]
        return [checkpoint for checkpoint in checkpoints if is_complete(checkpoint)]

    def _submit_all(self, checkpoints: list[Path], *, is_live: bool = False) -> None:
        for checkpoint in checkpoints:
            try:
                self._submit(checkpoint)
            except InputError:
                raise
            except PomscaleError as problem:
                if not is_live:
                    raise
                warn(f"{checkpoint.name} is tried again: {problem}")

    def _submit(self, checkpoint: Path) -> None:
        samples, request = samples_of(checkpoint), self.request
        job_folder = evaluation_folder(self.run, self.config.name, samples)
        prepared = prepare_evaluation(self.run, self.config, samples, replace(request, dry_run=False))
        if request.dry_run:
            say(f"{checkpoint.name}: would be submitted: pomscale {shlex.join(prepared.spec.commands[0])}")
            self.submitted.append(job_folder)
            return
        if request.profile.scheduler == "local" and self.submitted:  # on one machine one after another
            prepared = prepared.waiting_for({str(self.submitted[-1]): "any"})
        failed = job_folder / FAILED_FILE
        if not link(checkpoint, job_folder / EVALUATED_FOLDER):
            return  # retention has just deleted it
        try:
            job_id = prepared.submit(new_code=failed.is_file())
        except BaseException:
            if not is_started(job_folder) or failed.is_file():
                remove(job_folder / EVALUATED_FOLDER)
            raise
        failed.unlink(missing_ok=True)
        self.submitted.append(job_folder)
        say(f"{checkpoint.name}: job {job_id}")
