"""Makes each training step wait, in runs that a test meets in the middle (running.UNHURRIED has it on PYTHONPATH).

Such a run takes as long on any machine, and leaves the cores to the tests beside it. A test that stands still may come
too late all the same. The variable UNHURRIED_HELD therefore names a file (running.held_at) with a number of samples:
from there on no step is taken, and where the number is 0 no local job begins, until the file is deleted or holds a
larger number. A request to stop ends the wait of a step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

WAIT_S = float(os.environ.get("UNHURRIED_S", "0.04"))
HELD = os.environ.get("UNHURRIED_HELD")
LOOK_EVERY_S = 0.02
TRAINER = "pomscale.training.trainer"


def held_at() -> float:
    """Return the number of samples in the file: 0 while it is being written, infinity when there is none."""
    if HELD is None:
        return float("inf")
    try:
        return float(Path(HELD).read_text() or 0)
    except FileNotFoundError:
        return float("inf")


def slow_down(module: ModuleType) -> None:
    """Make each step of the trainer wait first."""
    step = module.Trainer._step

    def waiting_step(trainer: Any, clock: Any) -> Any:
        time.sleep(WAIT_S)
        while clock.samples >= held_at() and not trainer.process.stop.requested:
            time.sleep(LOOK_EVERY_S)
        return step(trainer, clock)

    module.Trainer._step = waiting_step


class _SlowDownOnImport(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_slow_down(module: ModuleType) -> None:
            execute(module)
            slow_down(module)

        spec.loader.exec_module = execute_and_slow_down  # type: ignore[method-assign]
        return spec


def fork_ranks(socket: str) -> None:
    """Start a stand-in (support.stand_in) in the place of each rank that this process, a guard, is about to start."""
    support = Path(__file__).parents[1]
    start = subprocess.Popen.__init__

    def start_a_stand_in(process: Any, command: list[str], **options: Any) -> None:
        rank = [sys.executable, "-u", "-m", "pomscale"]
        if command[: len(rank)] == rank:
            stand_in = [str(support / "stand_in.py"), socket, str(support.parents[1])]
            command = [sys.executable, "-I", "-S", *stand_in, *command[1:]]
        start(process, command, **options)

    subprocess.Popen.__init__ = start_a_stand_in  # type: ignore[method-assign]


if "FORKED_RANKS" in os.environ and sys.orig_argv[1:4] == ["-u", "-m", "launch.guard"]:
    fork_ranks(os.environ["FORKED_RANKS"])

if TRAINER in sys.modules:  # a process forked by support.forking
    slow_down(sys.modules[TRAINER])
else:
    sys.meta_path.insert(0, _SlowDownOnImport())

if "submitit.local._local" in sys.orig_argv:  # the controller of a local job
    while held_at() == 0:
        time.sleep(LOOK_EVERY_S)
