"""Local files and fsspec URLs: find them by name, list folders, and read contents.

Streams from here explain their own errors: while they are read, only PomscaleError is raised, and it says that storage
failed, not that the content is wrong.
"""

from __future__ import annotations

import errno
import glob
import heapq
import io
import itertools
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from data_pipelines.sources.protocol import SourceChangedError
from pomscale.base.errors import InputError, PomscaleError

_READ_AHEAD_BYTES = 2**16

# Names that are sorted in memory at once.
_RUN_LENGTH = 100_000


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, relative: str) -> str:
    """Return the path or URL of `relative` under `root`; with root '' it is `relative` itself."""
    return f"{root.rstrip('/')}/{relative}" if root else relative


def is_hidden(path: str) -> bool:
    """Return whether a relative path is hidden at any depth; programs that browse folders leave such files there.

    Hidden are names that begin with a dot (.ipynb_checkpoints, .DS_Store, the ._NAME of macOS) and __MACOSX.
    """
    return any(part == "__MACOSX" or (part[:1] == "." and part not in {".", ".."}) for part in path.split("/"))


# -- files by name -----------------------------------------------------------------------------------------------------


class NamedFiles:
    """The files that `source.path` names, each known by its path relative to the deepest folder that holds them all.

    An item's location has the relative path, so items are found again where all of their files have moved together.
    """

    def __init__(self, paths: str | list[str], example: str) -> None:
        """Take the paths, and an example of a pattern for files of this kind, for messages."""
        self._paths = [paths] if isinstance(paths, str) else paths
        self._example = example
        self._lock = threading.Lock()
        self._folder: str | None = None

    def find(self) -> list[tuple[str, str]]:
        """Return path and relative path of every file, sorted, each file once.

        Braces {000..012} and {a,b} are expanded, then wildcards. http(s) servers cannot list, so wildcards in their
        URLs are taken as they are. Raises InputError where a folder is named, or if a path or pattern names nothing.
        """
        found = self._expand(must_exist=True)
        if not found:
            raise InputError(f"source.path: names no file; give paths or patterns such as {self._example}")
        self._folder = _common_folder(found)
        return [(path, path.removeprefix(self._folder)) for path in found]

    def path(self, name: str) -> str:
        """Return the current path of a file, by the relative path that `find` gave, perhaps in an earlier run.

        The file may be gone. Raises FileNotFoundError if `source.path` names no file any more.
        """
        with self._lock:  # so that one of many threads looks
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
    """Return the deepest folder that holds all paths, with a slash at its end; '' if there is none."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "".join(f"{level[0]}/" for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _native(path: str) -> str:
    return path.removeprefix("file://")


# -- folders -----------------------------------------------------------------------------------------------------------


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


def list_folder(root: str, folder: str = "") -> Iterator[Entry]:
    """Yield the entries of root/folder, sorted by name, following links.

    Raises InputError if the folder is missing or cannot be read.
    """
    root = _native(root)
    try:
        yield from (_list_remote if is_url(root) else _list_local)(root, folder)
    except OSError as error:
        # A folder that cannot be listed might hold a whole class, so the rest alone will not do.
        path = error.filename or join(root, folder)
        raise InputError(f"source.path: cannot read {path}: {error.strerror or error}; mend or remove it") from error


def walk(root: str, folder: str = "") -> Iterator[Entry]:
    """Yield all files below root/folder, sorted by the parts of their paths. Raises the errors of `list_folder`."""
    for entry in list_folder(root, folder):
        if entry.is_folder:
            yield from walk(root, entry.path)
        else:
            yield entry


def _list_local(root: str, folder: str) -> Iterator[Entry]:
    top = join(root, folder) if folder else root
    with _opening(top), os.scandir(top) as entries:
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


# -- contents ----------------------------------------------------------------------------------------------------------


def open_stream(path: str) -> BinaryIO:
    """Open a file to scan, as a seekable stream.

    Raises InputError if there is no file or it may not be read, PomscaleError if storage fails.
    """
    path = _native(path)
    try:
        with _opening(path):
            raw = _RemoteFile(path) if is_url(path) else _LocalFile(path)
    except OSError as error:
        raise InputError(f"source: cannot read {path}: {error.strerror or error}") from error
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def read_file(path: str) -> bytes:
    """Return the contents of a file. Raises the errors of `open_stream`."""
    with open_stream(path) as stream:
        return stream.read()


def size_of(stream: BinaryIO) -> int:
    """Return the size of a stream in bytes, and rewind the stream."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return size


def open_item(path: str, size: int | None) -> BinaryIO:
    """Open an item's own file; raises the errors of `Source.open`.

    A file behind a URL is read at once and whole, which tells errors of storage from those of the content.

    Args:
        path: Path or URL of the file.
        size: Size in bytes that the scan saw, or None where it did not look.
    """
    path = _native(path)
    if is_url(path):
        content = _read_remote(path)
        check_size(len(content), size)
        return io.BytesIO(content)
    return _open_checked(path, size)


def open_large_item(path: str, size: int) -> BinaryIO:
    """Open a file as `open_item` does, but fetch only the parts that are read, also behind a URL."""
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
    """Reads items that lie within larger files. Each thread keeps the file that it read last open for its next item."""

    def __init__(self) -> None:
        self._last = threading.local()

    def read(self, path: str, offset: int, length: int, file_size: int) -> bytes:
        """Return `length` bytes at `offset` of a file of `file_size` bytes. Raises the errors of `open_item`."""
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
    """Return the bytes from `start` to `end` of a file behind a URL."""
    with _about_item(), _opening(url):
        storage, path = fsspec.core.url_to_fs(url)
        return storage.cat_file(path, start=start, end=end)


def check_size(num_bytes: int, expected: int | None) -> None:
    """Raise SourceChangedError if a file does not have the size that the scan saw."""
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
    """Explain errors while parts of a file behind a URL are read; not every HTTP server sends parts."""
    with _explained(url):
        try:
            yield
        except ValueError as error:  # fsspec's, where it gets the whole file instead
            raise InputError(f"{url}: its server does not send parts of files; download it first ({error})") from error


# Errors about a path or the file there; storage itself works.
_PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


@contextmanager
def _opening(path: str) -> Iterator[None]:
    """Explain errors while a file or folder is opened.

    Raises OSError if the path is at fault (nothing is there, it may not be read, it cannot name a file), PomscaleError
    if storage fails, InputError if there is no package for it.
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
    """An OSError whose number is one of _PATH_ERRORS."""


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise PomscaleError where storage fails; let OSError pass where storage works and this file cannot be had."""
    try:
        yield
    except (FileNotFoundError, PermissionError, _PathError, PomscaleError):
        raise
    except Exception as error:  # every storage has errors of its own
        status = getattr(error, "status", 0)  # aiohttp's: 4xx is about this file, but for time-outs and rate limits
        if 400 <= status < 500 and status not in {408, 429}:
            raise PermissionError(errno.EACCES, f"the server answers {status}", path) from error
        raise PomscaleError(
            f"{path}: cannot be read: {error}. What was finished before is kept; run the same command again to continue"
        ) from error


@contextmanager
def _about_item() -> Iterator[None]:
    """Raise SourceChangedError where an item's file cannot be opened for reasons of its own."""
    try:
        yield
    except (PermissionError, _PathError) as error:
        raise SourceChangedError(f"cannot be read: {error.strerror or error}") from error
