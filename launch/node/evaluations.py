"""Evaluations of a run's checkpoints while training goes on, each as a job of its own.

    RUN/evaluations/NAME/samples-000000012800/     the home of such a job, and the {folder} of its commands
        checkpoint/       hard links: retention may delete the checkpoint, its files stay until they are evaluated
        figures.json      what the last command found; recorded in RUN/evaluations.jsonl and wandb at 12,800 samples
        failed.json       {"reason": ...}: this checkpoint will not be evaluated by itself any more

The supervisor of the run starts them. Whatever happens to an evaluation is no matter to training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from launch.record.job import JOBS_FILE, LAUNCH_FILE, LaunchedAs
from launch.status.runs import summarize
from launch.status.state import LIVE
from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import link_or_copy, make_folder, write_text
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.load import load_train_recipe
from pomscale.runs.checkpoint_folder import complete_checkpoints, final_folder, remove, samples_of
from pomscale.runs.layout import CHECKPOINTS_FOLDER, MARKER

EVALUATIONS, CHECKPOINT, FAILED_FILE = "evaluations", "checkpoint", "failed.json"

_NUM_TRIES, _TRY_AGAIN_S = 3, 60.0  # a scheduler that does not answer now may do so in a minute
_SUBMISSION_TIMEOUT_S = 120.0
_LOOK_EVERY_S = 60.0


def evaluation_home(run: Path, name: str, samples: int) -> Path:
    return final_folder(run / EVALUATIONS / name, samples)


class Evaluations:
    """Of one run. Its state is on disk, so that each start of the run goes on where the one before it was."""

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
        for home in self._homes():
            if not _is_started(home):  # a supervisor was killed before it could submit: begun again, if still due
                remove(home / CHECKPOINT)

    def poll(self, *, finished: bool = False) -> None:
        """Start what is due. finished: training has come to its end, so the last checkpoint is due in any case.

        Never raises for a file that cannot be written or a job that is refused: that is told on stderr, once.
        """
        for config in self._configs:
            for checkpoint in self._due(config, finished):
                home = evaluation_home(self._run, config.name, samples_of(checkpoint))
                waits = time.monotonic() < self._not_before_s.get(home, 0.0) and not finished
                if not waits and self._tries.get(home, 0) < _NUM_TRIES:
                    self._try(config.name, checkpoint, home, last_try=finished)
        if finished or time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = time.monotonic()
            self._give_up_failed()

    def _due(self, config: EvaluationConfig, finished: bool) -> list[Path]:
        """The first complete checkpoint after each multiple of every_samples that was not started before."""
        checkpoints = complete_checkpoints(self._run / CHECKPOINTS_FOLDER)
        started = (home for home in self._homes() if home.parent.name == config.name and _is_started(home))
        newest = max(map(samples_of, started), default=0)
        due = []
        for checkpoint in checkpoints:
            if samples_of(checkpoint) // config.every_samples > newest // config.every_samples:
                due.append(checkpoint)
                newest = samples_of(checkpoint)
        if finished and checkpoints and samples_of(checkpoints[-1]) > newest:
            due.append(checkpoints[-1])
        return due

    def _homes(self) -> list[Path]:
        return sorted((self._run / EVALUATIONS).glob("*/samples-*"))

    def _try(self, name: str, checkpoint: Path, home: Path, last_try: bool) -> None:
        try:
            if _link(checkpoint, home / CHECKPOINT):
                _submit(self._run, name, samples_of(checkpoint))
        except (PomscaleError, OSError) as problem:
            self._tries[home] = self._tries.get(home, 0) + 1
            self._not_before_s[home] = time.monotonic() + _TRY_AGAIN_S
            if last_try or self._tries[home] >= _NUM_TRIES:
                _give_up(home, str(problem))
            elif self._tries[home] == 1:
                warn(f"evaluation {name} of {checkpoint.name} could not be started, and is tried again: {problem}")

    def _give_up_failed(self) -> None:
        """Those whose jobs ended without a word of their own, e.g. cancelled or at their time limit."""
        homes = [home for home in self._homes() if (home / CHECKPOINT).is_dir() and (home / JOBS_FILE).is_file()]
        if not homes:
            return
        found = summarize({home: home.name for home in homes})
        if found.problem:  # the scheduler does not answer: asked again in a minute
            return
        for run in found.runs:
            if run.state not in (*LIVE, "finished"):
                _give_up(run.home, run.reason or run.state)


def note_failure(home: Path, reason: str) -> None:
    """Of a job that has failed: if it is an evaluation, say so in its home, and let its checkpoint go."""
    if home.parent.parent.name == EVALUATIONS and (home / CHECKPOINT).is_dir():
        _give_up(home, reason)


def _is_started(home: Path) -> bool:
    """Submitted, or given up."""
    return (home / JOBS_FILE).is_file() or (home / FAILED_FILE).is_file()


def _link(checkpoint: Path, target: Path) -> bool:
    """Whether all of it is in `target` now: retention may have begun to delete it, marker first."""
    remove(target)
    make_folder(target)
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER]
    try:
        for path in (*files, checkpoint / MARKER):
            copy = target / path.relative_to(checkpoint)
            make_folder(copy.parent)
            link_or_copy(path, copy)
    except (FileNotFoundError, PomscaleError):
        remove(target)
        if (checkpoint / MARKER).is_file():
            raise
        return False
    return True


def _submit(run: Path, name: str, samples: int) -> None:
    """PomscaleError, with the words of what went wrong."""
    command = [sys.executable, "-m", "launch.evaluation_job", str(run), name, str(samples)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SUBMISSION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PomscaleError(f"no answer within {_SUBMISSION_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        words = done.stderr.rpartition("error: ")[2].strip()
        raise PomscaleError(words or f"its submission ended with exit code {done.returncode}")


def _give_up(home: Path, reason: str) -> None:
    warn(f"evaluation {home.parent.name} of {home.name} has failed: {reason}; training goes on ({home})")
    try:
        make_folder(home)
        write_text(home / FAILED_FILE, json.dumps({"reason": reason}))
        remove(home / CHECKPOINT)
    except (PomscaleError, OSError) as problem:
        warn(str(problem))
