"""What torch.compile has made, kept in the run folder: a requeued job does not compile again.

Inductor's own cache lies on a disk of the node, where the next start may not run. One file in the run folder holds it
for all ranks; what does not fit a machine or a version is not used: torch keys every artifact by what it depends on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.compiler._cache import CacheInfo

from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write
from pomscale.runs.layout import COMPILE_CACHE_FILE


class CompileCache:
    """path: None for a run that compiles nothing, where it does nothing. The main rank writes, all read."""

    def __init__(self, run_folder: Path | None, *, is_main: bool) -> None:
        self._path = None if run_folder is None else run_folder / COMPILE_CACHE_FILE
        self._is_main = is_main
        self._in_file: set[tuple[str, str]] = set()

    def load(self) -> None:
        """Before the first step. Without the file, or with a damaged one, all is compiled."""
        if self._path is None or not self._path.is_file():
            return
        try:
            self._in_file = _keys(torch.compiler.load_cache_artifacts(self._path.read_bytes()))
        except OSError as problem:
            warn(f"{self._path} cannot be read ({problem}); compiling again")

    def save(self) -> None:
        """After the first step: most of what is compiled. What goes wrong costs a compilation, not the run."""
        if self._path is None or not self._is_main:
            return
        artifacts = torch.compiler.save_cache_artifacts()
        # What this process has used; the file may have more, for a validation that is still to come.
        if artifacts is None or _keys(artifacts[1]) <= self._in_file:
            return
        try:
            with atomic_write(self._path) as stream:
                stream.write(artifacts[0])
            self._in_file = _keys(artifacts[1])
        except PomscaleError as problem:
            warn(f"{problem}; the next start compiles again")


def _keys(info: CacheInfo | None) -> set[tuple[str, str]]:
    return set() if info is None else {(kind, key) for kind, keys in info.artifacts.items() for key in keys}
