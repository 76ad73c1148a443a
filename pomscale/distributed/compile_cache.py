"""What torch.compile has made, kept in the run folder, so that a requeued job need not make all of it again.

On GPUs these are the kernels as well; on CPUs a start is spared tracing and lowering, and g++ compiles the kernels
again (torch 2.13). Inductor's own cache lies on a disk of the node, where the next start may not run. One file in the
run folder holds it for all ranks. torch keys every artifact by all that it depends on, so one of another machine or
version is not used.
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
    """Cache that all ranks read and the main rank writes; it does nothing with run_folder None (nothing compiled)."""

    def __init__(self, run_folder: Path | None, *, is_main: bool) -> None:
        self._path = None if run_folder is None else run_folder / COMPILE_CACHE_FILE
        self._is_main = is_main
        self._in_file: set[tuple[str, str]] = set()

    def load(self) -> None:
        """Load the cache, before the first step. Without the file, or with a damaged one, all is compiled."""
        if self._path is None or not self._path.is_file():
            return
        try:
            self._in_file = _keys(torch.compiler.load_cache_artifacts(self._path.read_bytes()))
        except OSError as problem:
            warn(f"{self._path} cannot be read ({problem}); compiling again")

    def save(self) -> None:
        """Save what is compiled, after the first step. A failure costs a compilation, not the run."""
        if self._path is None or not self._is_main:
            return
        artifacts = torch.compiler.save_cache_artifacts()
        # `artifacts` is what this process has used; the file may have more, for a validation that is still to come.
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
