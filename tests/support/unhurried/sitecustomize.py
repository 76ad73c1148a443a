"""On PYTHONPATH (running.UNHURRIED) of runs that a test meets in the middle: each step of training waits at first.

Such a run lasts as long on any machine, and leaves the cores to the tests beside it. A test that stands still may come
too late all the same: where HELD names a file (running.held_at), no step is taken from the number of samples on that
the file says, and no local job begins, until the file has gone or says more. A request to stop lets a step go on.
"""

from __future__ import annotations

import os
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


def held_at() -> float:
    """Samples; those of a file that is just being written are 0: to be looked at again."""
    if HELD is None:
        return float("inf")
    try:
        return float(Path(HELD).read_text() or 0)
    except FileNotFoundError:
        return float("inf")


class _Slow(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "pomscale.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_slow(module: ModuleType) -> None:
            execute(module)
            step = module.Trainer._step

            def waiting_step(trainer: Any, clock: Any) -> Any:
                time.sleep(WAIT_S)
                while clock.samples >= held_at() and not trainer.process.stop.requested:
                    time.sleep(LOOK_EVERY_S)
                return step(trainer, clock)

            module.Trainer._step = waiting_step

        spec.loader.exec_module = execute_and_slow  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Slow())

if "submitit.local._local" in sys.orig_argv:  # the controller of a local job: nobody knows yet that there is one
    while held_at() == 0:
        time.sleep(LOOK_EVERY_S)
