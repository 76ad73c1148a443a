"""Local files and fsspec URLs: which there are, and what is in them.

Streams from here explain their own errors: while they are read, only PomscaleError is raised, and it says that storage
failed, not that the content is wrong.
"""

from __future__ import annotations

import errno
import glob
import io
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from data_pipelines.sources.sorting import sorted_on_disk
from data_pipelines.sources.source import SourceChangedError
from pomscale.base.errors import InputError, PomscaleError

_READ_AHEAD_BYTES = 2**16


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, relative: str) -> str:
    """The path or URL of what lies at `relative` under `root`; root '' = as it stands."""
    return f"{root.rstrip('/')}/{relative}" if root else relative


# -- files by name -----------------------------------------------------------------------------------------------------


class NamedFiles:
    """The files that `source.path` names, each known by its path relative to the deepest folder that holds them all.

    That is what an item's place tells, so items are found again where all of their files have moved.
    """

    def __init__(self, paths: str | list[str], example: str) -> None:
        """`example`: a pattern for files of this kind, for messages."""
        self._paths = [paths] if isinstance(paths, str) else paths
        self._example = example
        self._lock = threading.Lock()
        self._folder: str | None = None

    def find(self) -> list[tuple[str, str]]:
        """Path and relative path: braces {000..012} and {a,b} expanded, then wildcards, sorted, each file once.

        http(s) servers cannot list, so wildcards in their URLs are taken as they are. InputError where a folder is
        named, or if a path or pattern names nothing.
        """
        found = self._expand(must_exist=True)
        if not found:
            raise InputError(f"source.path: names no file; give paths or patterns such as {self._example}")
        self._folder = _common_folder(found)
        return [(path, path.removeprefix(self._folder)) for path in found]

    def path(self, name: str) -> str:
        """Where a file now is of which `find` said the relative path, also in an earlier run. It may be gone.

        FileNotFoundError if `source.path` names no file any more.
        """
        with self._lock:  # so that many threads look once
            if self._folder is None:
                found = self._expand(must_exist=False)
                if not found:
                    raise FileNotFoundError(errno.ENOENT, "no file matches source.path", name)
                self._folder = _common_folder(found)
            return f"{self._folder}{name}"

    def _expand(self, must_exist: bool) -> list[str]:
        found = (found for path in self._paths for found in _expand(_native(path), self._example, must_exist))
        return sorted(set(found))


def _expand(path: str, example: str, must_exist: bool) -> Iterator[str]:
    if os.path.exists(path):  # also where its name has braces or brackets
        if os.path.isdir(path):
            raise InputError(f"source.path: {path} is a folder; name the files in it, e.g. {join(path, example)}")
        yield path
        return
    try:
        names = list(braceexpand(path))
    except ValueError as error:  # UnbalancedBracesError
        raise InputError(f"source.path: {path}: {error}; close every brace") from error
    for name in names:
        if name.startswith(("http://", "https://")):
            yield name
        elif any(wildcard in name for wildcard in "*?["):
            matches = _glob(name)
            if must_exist and not matches:
                raise InputError(f"source.path: no file matches {name}")
            yield from matches
        elif is_url(name) or not must_exist or os.path.exists(name):
            yield name
        else:
            raise InputError(f"source.path: there is no file {name}")


def _glob(pattern: str) -> list[str]:
    if not is_url(pattern):
        return glob.glob(pattern, recursive=True)
    try:
        with _opening(pattern):
            storage, path = fsspec.core.url_to_fs(pattern)
            return [storage.unstrip_protocol(match) for match in storage.glob(path)]
    except OSError as error:
        raise InputError(f"source.path: cannot read {pattern}: {error.strerror or error}") from error


def _common_folder(paths: list[str]) -> str:
    """The deepest folder that holds all paths, with a slash at its end; '' if there is none."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "".join(f"{level[0]}/" for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _native(path: str) -> str:
    return path.removeprefix("file://")


# -- folders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """What a folder lists. `path` is relative to where the listing began, with slashes.

    `size` in bytes; None for folders, where storage does not tell it, and where there is a `problem`.
    """

    path: str
    is_folder: bool
    size: int | None = None
    problem: str | None = None


def list_folder(root: str, folder: str = "") -> Iterator[Entry]:
    """What lies in root/folder, sorted by name. Links are followed. InputError if it is missing or cannot be read."""
    root = _native(root)
    try:
        yield from (_list_remote if is_url(root) else _list_local)(root, folder)
    except OSError as error:
        # What cannot be listed might hold a whole class: no reason to go on with the rest.
        place = error.filename or join(root, folder)
        raise InputError(f"source.path: cannot read {place}: {error.strerror or error}; mend or remove it") from error


def walk(root: str, folder: str = "") -> Iterator[Entry]:
    """All files below root/folder, sorted by the parts of their paths. Same errors as `list_folder`."""
    for entry in list_folder(root, folder):
        if entry.is_folder:
            yield from walk(root, entry.path)
        else:
            yield entry


def _list_local(root: str, folder: str) -> Iterator[Entry]:
    place = join(root, folder) if folder else root
    with _opening(place), os.scandir(place) as entries:
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
            yield Entry(path, is_folder, None if is_folder else found.st_size)


def _list_remote(root: str, folder: str) -> Iterator[Entry]:
    url = join(root, folder)
    with _opening(url):
        storage, path = fsspec.core.url_to_fs(url)
        found = storage.ls(path, detail=True)
        storage.invalidate_cache(path)  # or fsspec keeps all that was ever listed
    entries = []
    for info in found:
        if info["name"].rstrip("/") != path.rstrip("/"):  # object stores may list the folder itself
            name = info["name"].rstrip("/").rpartition("/")[2]
            is_folder = info["type"] == "directory"
            entries.append(Entry(join(folder, name), is_folder, None if is_folder else info.get("size")))
    yield from sorted(entries, key=lambda entry: entry.path)


# -- contents ----------------------------------------------------------------------------------------------------------


def open_stream(path: str) -> BinaryIO:
    """A file to scan, seekable. InputError if there is none or it may not be read, PomscaleError if storage fails."""
    path = _native(path)
    try:
        with _opening(path):
            raw = _RemoteFile(path) if is_url(path) else _LocalFile(path)
    except OSError as error:
        raise InputError(f"source: cannot read {path}: {error.strerror or error}") from error
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def read_file(path: str) -> bytes:
    """A whole file. Same errors as `open_stream`."""
    with open_stream(path) as stream:
        return stream.read()


def size_of(stream: BinaryIO) -> int:
    """In bytes. The stream is at its beginning afterwards."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return size


def open_item(path: str, size: int | None) -> BinaryIO:
    """An item's own file, `Source.open`. `size` is what the scan saw, in bytes, or None where it did not look.

    A file behind a URL is read at once and whole: so errors of storage are told from those of the content.
    """
    path = _native(path)
    if is_url(path):
        content = _read_remote(path)
        check_size(len(content), size)
        return io.BytesIO(content)
    return _open_checked(path, size)


def open_large_item(path: str, size: int) -> BinaryIO:
    """As `open_item`, of a file of which little is read: behind a URL, too, only what is asked for is fetched."""
    path = _native(path)
    if not is_url(path):
        return _open_checked(path, size)
    with _about_item(), _opening(path):
        stream = io.BufferedReader(_RemoteFile(path), _READ_AHEAD_BYTES)
    try:
        check_size(size_of(stream), size)
    except BaseException:
        stream.close()
        raise
    return stream


class RangeReader:
    """Items that lie within larger files. A thread keeps the file that it read last open: neighbours are in it too."""

    def __init__(self) -> None:
        self._last = threading.local()

    def read(self, path: str, offset: int, length: int, file_size: int) -> bytes:
        """Same errors as `open_item`; `file_size`, in bytes, is what the scan saw."""
        path = _native(path)
        if is_url(path):
            content = _read_remote(path, offset, offset + length)
        else:
            if getattr(self._last, "path", None) != path:
                self._last.stream = _open_checked(path, file_size)
                self._last.path = path
            self._last.stream.seek(offset)
            content = self._last.stream.read(length)
        check_size(len(content), length)
        return content


def _open_checked(path: str, size: int | None) -> BinaryIO:
    with _about_item(), _opening(path):
        raw = _LocalFile(path)
    try:
        check_size(os.fstat(raw.fileno()).st_size, size)
    except SourceChangedError:
        raw.close()
        raise
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def _read_remote(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes start to end of a file behind a URL."""
    with _about_item(), _opening(url):
        storage, path = fsspec.core.url_to_fs(url)
        return storage.cat_file(path, start=start, end=end)


def check_size(num_bytes: int, expected: int | None) -> None:
    """SourceChangedError if a file has not the size that the scan saw."""
    if expected is not None and num_bytes != expected:
        raise SourceChangedError(
            f"changed since it was listed ({expected:,} bytes then, {num_bytes:,} now); "
            f"encode into another output to take it in"
        )


class _LocalFile(io.FileIO):
    def __init__(self, path: str) -> None:
        super().__init__(path, "r")
        self._path = path

    def readinto(self, buffer: Any) -> int | None:
        with _explained(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _explained(self._path):
            return super().readall()


class _RemoteFile(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self._url = url
        storage, path = fsspec.core.url_to_fs(url)
        self._file = storage.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _parts(self._url):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _parts(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _parts(url: str) -> Iterator[None]:
    """Around reads of parts of a file behind a URL, which not every HTTP server sends."""
    with _explained(url):
        try:
            yield
        except ValueError as error:  # fsspec's, where it gets the whole file instead
            raise InputError(f"{url}: its server does not send parts of files; download it first ({error})") from error


# What is wrong with a path or with what lies there; storage is well.
_PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


@contextmanager
def _opening(path: str) -> Iterator[None]:
    """OSError if the path is at fault: nothing is there, it may not be read, it is none of a file.

    PomscaleError if storage fails, InputError if there is no package for it.
    """
    with _explained(path):
        try:
            yield
        except ImportError as error:
            raise InputError(f"{path}: this kind of URL cannot be read here: {error}") from error
        except ValueError as error:  # a zero byte, half a surrogate pair, a kind of URL that does not exist
            raise _PathError(errno.EINVAL, str(error), path) from error
        except OSError as error:
            if error.errno not in _PATH_ERRORS:
                raise
            raise _PathError(error.errno, error.strerror, path) from error


class _PathError(OSError):
    """One of _PATH_ERRORS."""


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """PomscaleError if storage fails; OSError if it works, and this file is not there or not to be had."""
    try:
        yield
    except (FileNotFoundError, PermissionError, _PathError, PomscaleError):
        raise
    except Exception as error:  # every storage has errors of its own
        status = getattr(error, "status", 0)  # aiohttp's: 4xx is about this file, but for time-outs and rate limits
        if 400 <= status < 500 and status not in {408, 429}:
            raise PermissionError(errno.EACCES, f"the server answers {status}", path) from error
        raise PomscaleError(
            f"{path}: cannot be read: {error}. What was finished before is kept; run the same command again to go on"
        ) from error


@contextmanager
def _about_item() -> Iterator[None]:
    """Around `_opening` of an item's file."""
    try:
        yield
    except (PermissionError, _PathError) as error:
        raise SourceChangedError(f"cannot be read: {error.strerror or error}") from error
