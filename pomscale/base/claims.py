"""Claims of processes on numbered parts of a work that they share, wherever they run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder

# Bytes of the file of claims beyond any part.
_LISTING = 2**40
_FINISH = 2**40 + 1


class Claims:
    """Locks that say which task makes which part: POSIX record locks, which end with the process that holds them.

    Parallel file systems have them across nodes. Where one was mounted without them, a single task is warned, and
    several tasks are refused, since they would remove each other's files.
    """

    def __init__(self, folder: Path, several: bool) -> None:
        """Open the file of claims, for one task or `several` at once. InputError if it cannot be written."""
        make_folder(folder)
        path = folder / "claims"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error}; choose another output") from error
        self._path = path
        self._several = several
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)  # drops all locks

    def claim(self, part: int) -> bool:
        """Claim a part; return whether it is this process's now."""
        return self._lock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, part: int) -> None:
        self._lock(part, fcntl.LOCK_UN)

    @contextmanager
    def listing(self) -> Iterator[None]:
        """Let one task at a time into the block, which lists the source; the others wait."""
        with self._alone(_LISTING):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let one task at a time into the block, which puts the parts together; the others wait."""
        with self._alone(_FINISH):
            yield

    @contextmanager
    def _alone(self, byte: int) -> Iterator[None]:
        self._lock(byte, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(byte, fcntl.LOCK_UN)

    def _lock(self, byte: int, operation: int) -> bool:
        try:
            fcntl.lockf(self._file, operation, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that somebody else has
            return False
        except OSError as error:
            problem = f"{self._path}: {error}: this file system has no locks, so tasks cannot see each other's parts"
            if self._several:
                raise InputError(f"{problem}; choose another output, or use one task") from error
            if not self._warned:
                warn(f"{problem}; do not start a second process on this output")
            self._warned = True
        return True
