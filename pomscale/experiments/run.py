"""Running of an experiment: every step that is not done yet, one command after another, as a user would type them.

Several processes may work on one experiment: each claims the steps that it does. A step that fails is listed, and the
others go on.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pomscale.base.claims import Claims
from pomscale.base.console import format_duration, say, warn
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import make_folder
from pomscale.config.experiment import ExperimentRecipe
from pomscale.distributed.stop import EXIT_STOPPED
from pomscale.experiments.points import Experiment, Point, Training
from pomscale.experiments.steps import (
    PREPARE,
    Record,
    asked_of_point,
    asked_of_prepare,
    is_done,
    is_training_done,
    log_file,
    read_record,
    write_record,
)

_NUM_LINES_SHOWN = 12


class Stopped(PomscaleError):
    """A stop was requested; what is done is kept."""

    exit_code = EXIT_STOPPED


@dataclass
class Outcome:
    """Names of steps that failed, with the reason, and of those that could not be done yet."""

    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not self.failed and not self.waiting


def run_experiment(experiment: Experiment, only: str | None = None) -> Outcome:
    """Do what is not done yet, of the whole experiment or of one step.

    Args:
        experiment: The experiment.
        only: Name of a training or of a point; None = all.

    Raises:
        InputError: There is no such step, or a run was begun by another recipe.
        PomscaleError: The data cannot be prepared.
        Stopped: A stop was requested.
    """
    names = _names_in_order(experiment)
    if only is not None and only not in names:
        raise InputError(f"--only {only}: no step has this name; they are in the output of --dry-run")
    for training in experiment.trainings:
        is_training_done(training)  # refuses a run of another recipe before anything is computed
    make_folder(experiment.folder)
    with Claims(experiment.folder, several=only is not None) as claims:
        return _Runner(experiment, claims, {name: number for number, name in enumerate(names)}).run(only)


def _names_in_order(experiment: Experiment) -> list[str]:
    """Return the names of all steps: a point comes after its trainings, so that the first figures come early."""
    names = [PREPARE] if experiment.recipe.prepare else []
    for point in experiment.points:
        names += [*(training.name for training in point.trainings.values()), point.name]
    return list(dict.fromkeys(names))


@dataclass
class _Stop:
    """Whether a stop was requested. SIGTERM is passed on to the command at work, so that a run saves its state."""

    is_requested: bool = False
    command: subprocess.Popen[bytes] | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take SIGTERM as the request."""
        before = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.is_requested = True
        if self.command is not None:
            self.command.send_signal(number)

    def check(self) -> None:
        """Raise Stopped if it was requested."""
        if self.is_requested:
            raise Stopped("stopped on request; run the same command again to continue")

    def call(self, command: Sequence[str], log: Path) -> int:
        """Run a command with its output in a file, and return its exit code; 0 also if a stop came meanwhile.

        Raises Stopped if a stop was requested before, or if the command ended upon one.
        """
        self.check()
        with log.open("ab") as stream:
            self.command = process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        if self.is_requested:  # since the check, before there was a command to pass it on to
            process.terminate()
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C, which the command has got, too
            process.wait()
            raise
        finally:
            self.command = None
        self.is_requested |= code == EXIT_STOPPED
        if code:
            self.check()
        return code


@dataclass
class _Runner:
    experiment: Experiment
    claims: Claims
    numbers: dict[str, int]
    outcome: Outcome = field(default_factory=Outcome)
    stop: _Stop = field(default_factory=_Stop)

    def run(self, only: str | None) -> Outcome:
        with self.stop.heeded():
            self._steps(self.numbers if only is None else [only])
        return self.outcome

    def _steps(self, names: Iterable[str]) -> None:
        trainings = {training.name: training for training in self.experiment.trainings}
        points = {point.name: point for point in self.experiment.points}
        for name in names:
            if name in trainings:
                self._train(trainings[name])
            elif name in points:
                self._measure(points[name])
            else:
                self._prepare()

    def _prepare(self) -> None:
        asked = asked_of_prepare(self.experiment)
        with self.claims.finishing():  # whoever comes second finds it done
            if is_done(self.experiment, PREPARE, asked):
                return
            commands = [_python(shlex.split(command)) for command in self.experiment.recipe.prepare]
            begun_s = time.monotonic()
            if reason := self._commands(PREPARE, commands):
                raise PomscaleError(f"the data could not be prepared: {reason}")
            write_record(self.experiment, PREPARE, Record(asked, "done", time.monotonic() - begun_s))

    def _train(self, training: Training) -> None:
        if is_training_done(training):
            return
        if not all(is_training_done(one) for one in self.experiment.trainings if one.name in training.needs):
            self.outcome.waiting.append(training.name)
            return
        with self._claimed(training.name) as is_ours:
            if is_ours and not is_training_done(training):
                self._command_of_training(training)

    def _command_of_training(self, training: Training) -> None:
        ranks = self.experiment.recipe.ranks
        command = _python(training.words)
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *torchrun, *command[1:]]
        if reason := self._commands(training.name, [command]):
            self.outcome.failed[training.name] = reason

    def _measure(self, point: Point) -> None:
        if not all(is_training_done(training) for training in point.trainings.values()):
            self.outcome.waiting.append(point.name)
            return
        asked = asked_of_point(point)
        if not point.commands or is_done(self.experiment, point.name, asked):
            return
        with self._claimed(point.name) as is_ours:
            if not is_ours or is_done(self.experiment, point.name, asked):
                return
            begun = read_record(self.experiment, point.name)
            if begun is None or begun.asked != asked:
                shutil.rmtree(point.folder, ignore_errors=True)  # other commands have left it, or another training
            make_folder(point.folder)
            write_record(self.experiment, point.name, Record(asked, "begun"))
            begun_s = time.monotonic()
            reason = self._commands(point.name, [_python(words) for words in point.commands])
            reason = reason or _file_not_left(self.experiment.recipe, point)
            seconds = time.monotonic() - begun_s
            write_record(self.experiment, point.name, Record(asked, "failed" if reason else "done", seconds, reason))
            if reason:
                self.outcome.failed[point.name] = reason

    @contextmanager
    def _claimed(self, step: str) -> Iterator[bool]:
        """Claim a step; what another process does is waited for by nobody."""
        number = self.numbers[step]
        if not self.claims.claim(number):
            self.outcome.waiting.append(step)
            yield False
            return
        try:
            yield True
        finally:
            self.claims.release(number)

    def _commands(self, step: str, commands: Sequence[Sequence[str]]) -> str:
        """Run commands of a step, and return why the first that failed did; '' if all succeeded."""
        log = log_file(self.experiment, step)
        make_folder(log.parent)
        done, total = self.numbers[step] + 1, len(self.numbers)
        say(f"[{done}/{total}] {step}")
        begun_s = time.monotonic()
        for command in commands:
            say(f"  $ {shlex.join(['python', *command[1:]])}")
            if code := self.stop.call(command, log):
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_NUM_LINES_SHOWN:]
                warn("\n  ".join([f"{step}: the command above failed with exit code {code}; the end of {log}:", *tail]))
                return f"exit code {code} of `{shlex.join(['python', *command[1:]])}`, see {log}"
        say(f"  {format_duration(time.monotonic() - begun_s)}")
        return ""


def _file_not_left(recipe: ExperimentRecipe, point: Point) -> str:
    """Return which file a measure misses after the point's commands; '' if all are there."""
    for name, measure in recipe.measures.items():
        if measure.file is not None and not (point.folder / measure.file).is_file():
            return f"its commands ended well and left no {measure.file}, which measures.{name} needs"
    return ""


def _python(words: Sequence[str]) -> list[str]:
    """Return the command line for words of `pomscale`, or for `-m MODULE ...`."""
    return [sys.executable, *(words if words[0] == "-m" else ["-m", "pomscale", *words])]
