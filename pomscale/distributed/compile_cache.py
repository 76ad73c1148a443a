"""What torch.compile has made, kept in the run folder: a requeued job does not compile again.

Inductor's own cache lies on a disk of the node, where the next start may not run. One file in the run folder holds it
for all ranks; what does not fit a machine or a version is not used: torch keys every artifact by what it depends on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pomscale.errors import PomscaleError
from pomscale.files import atomic_write

FILE = "compile_cache.bin"


class CompileCache:
    """path: None for a run that compiles nothing, where it does nothing. The main rank writes, all read."""

    def __init__(self, run_folder: Path | None, *, is_main: bool) -> None:
        self._path = None if run_folder is None else run_folder / FILE
        self._is_main = is_main

    def load(self) -> None:
        """Before the first step."""
        if self._path is not None and self._path.is_file():
            torch.compiler.load_cache_artifacts(self._path.read_bytes())

    def save(self) -> None:
        """After the first step: most of what is compiled. What goes wrong costs a compilation, not the run."""
        if self._path is None or not self._is_main:
            return
        artifacts = torch.compiler.save_cache_artifacts()
        if artifacts is None:  # nothing was compiled that was not in the file
            return
        try:
            with atomic_write(self._path) as stream:
                stream.write(artifacts[0])
        except PomscaleError as problem:
            print(f"warning: {problem}; the next start compiles again", file=sys.stderr)
