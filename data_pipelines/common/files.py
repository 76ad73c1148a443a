"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from pomscale.errors import PomscaleError


@contextmanager
def atomic_write(path: Path) -> Iterator[BufferedRandom]:
    """A stream, readable and writable, that becomes `path` when the block ends without an error.

    On an error nothing is left behind. PomscaleError, naming the file, where the disk is full or cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)  # the rename itself must survive a power cut
    except OSError as error:
        raise PomscaleError(
            f"cannot write {path}: {error}. What was finished before is kept; "
            f"make room and run the same command again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
