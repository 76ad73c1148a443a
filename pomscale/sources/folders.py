"""Listings of folders, on disk and behind URLs, with the same names and in the same order."""

from __future__ import annotations

import errno
import heapq
import itertools
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pomscale.base.errors import InputError
from pomscale.sources.faults import while_opening
from pomscale.sources.storage import is_hidden, join, native
from pomscale.sources.urls import check_url, is_url, list_url

# Names that are sorted in memory at once.
_RUN_LENGTH = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder in a listing."""

    path: str
    """Path relative to the root of the listing, with slashes."""
    is_folder: bool
    size: int | None = None
    """Size in bytes; None for folders, where storage does not tell it, and where there is a `problem`."""
    problem: str | None = None
    """Reason why the file cannot be read."""
    modified_ns: int | None = None
    """Time of the last change in nanoseconds; None for folders, behind URLs, and where there is a `problem`."""

    @property
    def is_hidden(self) -> bool:
        """Whether its own name is hidden."""
        return is_hidden(self.path.rpartition("/")[2])


def check_folder(root: str) -> None:
    """Raise InputError if the folder is missing or cannot be read; its entries are not listed."""
    root = native(root)
    with _about_source(root):
        if is_url(root):
            check_url(root)
        else:
            with while_opening(root):
                os.scandir(root).close()


def list_folder(root: str, folder: str = "") -> Iterator[Entry]:
    """Yield the entries of root/folder, sorted by name, following links.

    Raises InputError if the folder is missing or cannot be read.
    """
    root = native(root)
    with _about_source(join(root, folder)):
        yield from (_list_remote if is_url(root) else _list_local)(root, folder)


@contextmanager
def _about_source(path: str) -> Iterator[None]:
    """Raise InputError where a folder cannot be had: it might hold a whole class, so the rest alone will not do."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"source.path: cannot read {error.filename or path}: {error.strerror or error}; mend or remove it"
        ) from error


def walk(root: str, folder: str = "") -> Iterator[Entry]:
    """Yield all files below root/folder, and hidden folders, which are not entered, sorted by the parts of their paths.

    Raises the errors of `list_folder`.
    """
    for entry in list_folder(root, folder):
        if entry.is_folder and not entry.is_hidden:
            yield from walk(root, entry.path)
        else:
            yield entry


def _list_local(root: str, folder: str) -> Iterator[Entry]:
    top = join(root, folder) if folder else root
    with while_opening(top), os.scandir(top) as entries:
        names = sorted_on_disk(entry.name for entry in entries)
    for name in names:
        path = join(folder, name)
        try:
            found = os.stat(join(root, path))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise  # a link that leads back to a folder above it: the same files without end
            yield Entry(path, is_folder=False, problem=f"cannot be read: {error.strerror}")
        else:
            is_folder = stat.S_ISDIR(found.st_mode)
            yield Entry(path, True) if is_folder else Entry(path, False, found.st_size, modified_ns=found.st_mtime_ns)


def _list_remote(root: str, folder: str) -> Iterator[Entry]:
    found = list_url(join(root, folder))
    entries = (Entry(join(folder, name), is_folder, size) for name, is_folder, size in found)
    yield from sorted(entries, key=lambda entry: entry.path)


def sorted_on_disk(names: Iterable[str], run_length: int = _RUN_LENGTH) -> Iterator[str]:
    """Return the names in sorted order, with at most `run_length` of them in memory.

    More names go through temporary files, in runs. `names` is read to its end at once.
    """
    names = iter(names)
    run = sorted(itertools.islice(names, run_length))
    files = []
    while len(run) == run_length:
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the merge
        file.writelines(f"{json.dumps(name)}\n" for name in run)
        file.seek(0)
        files.append(file)
        run = sorted(itertools.islice(names, run_length))
    return heapq.merge(run, *(map(json.loads, file) for file in files))
