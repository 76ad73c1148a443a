"""On PYTHONPATH (running.UNHURRIED) of runs that a test meets in the middle: each step of training waits at first.

Such a run lasts as long on any machine, and leaves the cores to the tests beside it.
"""

from __future__ import annotations

import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

WAIT_S = 0.04


class _Slow(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "pomscale.trainer":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_slow(module: ModuleType) -> None:
            execute(module)
            step = module.Trainer._step

            def waiting_step(*arguments: Any) -> Any:
                time.sleep(WAIT_S)
                return step(*arguments)

            module.Trainer._step = waiting_step

        spec.loader.exec_module = execute_and_slow  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Slow())
