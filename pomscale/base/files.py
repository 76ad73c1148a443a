"""Files that are either whole or absent, also after a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError, PomscaleError

_TEMPORARY = ".{pid}-{token}.tmp"
_TEMPORARIES = "*.*-" + 8 * "[0-9a-f]" + ".tmp"

# Reasons for which a file system refuses a link: another file system, no links at all, or too many of them.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def atomic_write(path: Path) -> Iterator[BufferedRandom]:
    """Give a stream, readable and writable, whose file becomes `path` when the block ends without an error.

    On an error nothing is left behind. Raises PomscaleError, naming the file, where the disk is full or cannot be
    written; other errors in the block stay as they are. Writers of one path do not disturb each other: the last one
    wins.
    """
    temporary = path.with_name(path.name + _TEMPORARY.format(pid=os.getpid(), token=secrets.token_hex(4)))
    file = _File(temporary, path)
    try:
        with BufferedRandom(file) as stream:
            yield stream
            stream.flush()
            with _explained(path):
                os.fsync(stream.fileno())
        with _explained(path):
            temporary.replace(path)
            sync_folder(path.parent)  # the rename itself must survive a power cut
    finally:
        temporary.unlink(missing_ok=True)


class _File(FileIO):
    """Raw file under `atomic_write`'s stream; errors of its own become a PomscaleError, those of other files do not."""

    def __init__(self, temporary: Path, path: Path) -> None:
        self._path = path
        with _explained(path):
            super().__init__(temporary, "x+")

    def write(self, data: Any) -> int:
        with _explained(self._path):
            return super().write(data)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PomscaleError(
            f"cannot write {path}: {error}. What was finished before is kept; "
            f"make room and run the same command again to continue"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8 by `atomic_write`."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def remove_leftovers(folder: Path, start: str = "") -> None:
    """Delete what killed writers of files `start`... left in a folder, which nobody else may be writing now."""
    for path in folder.glob(start + _TEMPORARIES):
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Replace `target` by a hard link to `source`, or a copy where there are no links; return whether it is a copy.

    Raises PomscaleError, naming both, if neither can be made.
    """
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise PomscaleError(f"{source}: cannot be linked to {target}: {error}") from error
    else:
        return False
    with source.open("rb") as stream, atomic_write(target) as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder that the user named, with its parents. Raises InputError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be made: {error}; choose another location") from error


def check_suffix(path: Path, suffix: str) -> None:
    """Raise InputError if the name promises another format than that of `suffix` (".png"), which is written."""
    if path.suffix and path.suffix.lower() != suffix:
        raise InputError(f"{path}: this file is written as {suffix}; name it {path.with_suffix(suffix).name}")


def check_can_be_written(path: Path) -> None:
    """Check before the work that a file can be written there, and make its folder. Raises InputError if not."""
    make_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; name a file in it, such as {path / 'NAME'}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {path.parent} cannot be written; choose another location")
