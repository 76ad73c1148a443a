"""Evaluations of a run's checkpoints while training continues, each as a job of its own.

    RUN/evaluations/NAME/samples-000000012800/     the job folder, and the {folder} of its commands
        checkpoint/       hard links: the files stay until they are evaluated, even if retention deletes the checkpoint
        figures.json      result of the last command; recorded in RUN/evaluations.jsonl and wandb at 12,800 samples
        failed.json       {"reason": ...}: the evaluation of this checkpoint has failed and is not started again

The supervisor of the run starts those of the recipe, and `pomscale evaluate images RUN --every` others
(launch.pipelines.checkpoints). An evaluation that fails does not affect training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.record.job import LaunchedAs
from launch.status.runs import summarize
from launch.status.state import LIVE
from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder, write_text
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.load import load_train_recipe
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, link, remove, samples_of
from pomscale.runs.layout import (
    CHECKPOINTS_FOLDER,
    EVALUATED_FOLDER,
    EVALUATIONS_FOLDER,
    FAILED_FILE,
    JOBS_FILE,
    LAUNCH_FILE,
)

_NUM_TRIES, _TRY_AGAIN_S = 3, 60.0  # a scheduler that does not answer now may do so in a minute
_SUBMISSION_TIMEOUT_S = 120.0
_LOOK_EVERY_S = 60.0


def evaluation_folder(run: Path, name: str, samples: int) -> Path:
    return final_folder(run / EVALUATIONS_FOLDER / name, samples)


class Evaluations:
    """The evaluations of one run. Their state is on disk, so that each start of the run continues from it."""

    def __init__(self, run_folder: Path) -> None:
        """PomscaleError if the run's launch.json or recipe cannot be read."""
        launched = LaunchedAs.read(run_folder / LAUNCH_FILE)
        if launched.recipe is None:
            raise PomscaleError(f"{run_folder / LAUNCH_FILE}: names no recipe; launch the run again")
        self._run = run_folder.resolve()
        self._configs = load_train_recipe(run_folder / launched.recipe).evaluations
        self._tries: dict[Path, int] = {}
        self._not_before_s: dict[Path, float] = {}
        self._looked_s = time.monotonic()
        for config in self._configs:
            for job_folder in job_folders(self._run, config.name):
                if not is_started(job_folder):  # a supervisor was killed before it could submit; repeated if still due
                    remove(job_folder / EVALUATED_FOLDER)

    def poll(self, *, finished: bool = False) -> None:
        """Start the evaluations that are due.

        A file that cannot be written, or a job that is refused, gives a warning and no exception.

        Args:
            finished: Whether training has ended, so that the last checkpoint is due in any case.
        """
        for config in self._configs:
            for checkpoint in due_checkpoints(self._run, config, finished=finished):
                job_folder = evaluation_folder(self._run, config.name, samples_of(checkpoint))
                waits = time.monotonic() < self._not_before_s.get(job_folder, 0.0) and not finished
                if not waits and self._tries.get(job_folder, 0) < _NUM_TRIES:
                    self._try(config.name, checkpoint, job_folder, last_try=finished)
        if finished or time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = time.monotonic()
            give_up_failed(job_folders(self._run))

    def _try(self, name: str, checkpoint: Path, job_folder: Path, last_try: bool) -> None:
        try:
            if link(checkpoint, job_folder / EVALUATED_FOLDER):
                _submit(self._run, name, samples_of(checkpoint))
        except (PomscaleError, OSError) as problem:
            self._tries[job_folder] = self._tries.get(job_folder, 0) + 1
            self._not_before_s[job_folder] = time.monotonic() + _TRY_AGAIN_S
            if last_try or self._tries[job_folder] >= _NUM_TRIES:
                _give_up(job_folder, str(problem))
            elif self._tries[job_folder] == 1:
                warn(f"evaluation {name} of {checkpoint.name} could not be started, and is tried again: {problem}")


def job_folders(run: Path, name: str = "*") -> list[Path]:
    """Return the job folders of a run's evaluations, or of one of them."""
    return sorted((run / EVALUATIONS_FOLDER).glob(f"{name}/samples-*"))


def due_checkpoints(run: Path, config: EvaluationConfig, *, finished: bool) -> list[Path]:
    """Return the first complete checkpoint after each multiple of every_samples whose evaluation has not begun.

    Args:
        run: The run folder.
        config: The evaluation.
        finished: Whether training has ended, so that the last checkpoint is due in any case.
    """
    checkpoints = complete_checkpoints(run / CHECKPOINTS_FOLDER)
    begun = [samples_of(job_folder) for job_folder in job_folders(run, config.name) if is_started(job_folder)]
    taken, due = {0} | {samples // config.every_samples for samples in begun}, []
    for checkpoint in checkpoints:
        multiple = samples_of(checkpoint) // config.every_samples
        if multiple not in taken:
            due.append(checkpoint)
            taken.add(multiple)
    if finished and checkpoints and samples_of(checkpoints[-1]) > max([*begun, *map(samples_of, due)], default=0):
        due.append(checkpoints[-1])
    return due


def give_up_failed(folders: Sequence[Path]) -> None:
    """Give up those evaluations whose jobs have ended without a result, e.g. cancelled or at their time limit."""
    submitted = [
        job_folder
        for job_folder in folders
        if (job_folder / EVALUATED_FOLDER).is_dir() and (job_folder / JOBS_FILE).is_file()
    ]
    if not submitted:
        return
    found = summarize({job_folder: job_folder.name for job_folder in submitted})
    if found.problem:  # the scheduler does not answer; it is asked again in a minute
        return
    for run in found.runs:
        if run.state not in (*LIVE, "finished"):
            _give_up(run.job_folder, run.reason or run.state)


def note_failure(job_folder: Path, reason: str) -> None:
    """Record the failure of a job in its job folder and remove its checkpoint, if the job is an evaluation."""
    if job_folder.parent.parent.name == EVALUATIONS_FOLDER and (job_folder / EVALUATED_FOLDER).is_dir():
        _give_up(job_folder, reason)


def is_started(job_folder: Path) -> bool:
    """Whether the evaluation was submitted, or given up."""
    return (job_folder / JOBS_FILE).is_file() or (job_folder / FAILED_FILE).is_file()


def _submit(run: Path, name: str, samples: int) -> None:
    """Submit the job of an evaluation. PomscaleError, with the message of the process that failed to submit it."""
    command = [sys.executable, "-m", "launch.evaluation_job", str(run), name, str(samples)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SUBMISSION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PomscaleError(f"no answer within {_SUBMISSION_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        words = done.stderr.rpartition("error: ")[2].strip()
        raise PomscaleError(words or f"its submission ended with exit code {done.returncode}")


def _give_up(job_folder: Path, reason: str) -> None:
    name = job_folder.parent.name
    warn(f"evaluation {name} of {job_folder.name} has failed: {reason}; training continues ({job_folder})")
    try:
        make_folder(job_folder)
        write_text(job_folder / FAILED_FILE, json.dumps({"reason": reason}))
        remove(job_folder / EVALUATED_FOLDER)
    except (PomscaleError, OSError) as problem:
        warn(str(problem))
