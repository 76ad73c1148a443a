"""Local files and fsspec URLs: find them by name, and read contents.

Streams from here explain their own errors: while they are read, only PomscaleError is raised, and it says that storage
failed, not that the content is wrong.
"""

from __future__ import annotations

import errno
import glob
import io
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from braceexpand import braceexpand

from pomscale.base.errors import InputError
from pomscale.sources.faults import about_item, while_opening, while_reading
from pomscale.sources.protocol import SourceChangedError
from pomscale.sources.urls import RemoteFile, escaped, is_http, is_url, plain, read_url, requested

_READ_AHEAD_BYTES = 2**16

# First bytes of compressed files. Those of bzip2 are ten, since a tar or a table may begin with any three letters.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
}
MAGIC_BYTES = max(map(len, _COMPRESSED))


def join(root: str, relative: str) -> str:
    """Return the path or URL of the name `relative` under `root`; with root '' it is `relative` itself."""
    return f"{root.rstrip('/')}/{escaped(root, relative)}" if root else relative


def native(path: str) -> str:
    """Return a file:// URL as the path that it is."""
    return path.removeprefix("file://")


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
        self._by_name: dict[str, str] | None = None

    def find(self) -> list[tuple[str, str]]:
        """Return path and relative path of every file, sorted by the latter, each file once.

        Braces {000..012} and {a,b} are expanded, then wildcards. http(s) servers cannot list, so wildcards in their
        URLs are taken as they are. Raises InputError where a folder is named, or if a path or pattern names nothing.
        """
        found = self._expand(must_exist=True)
        if not found:
            raise InputError(f"source.path: names no file; give paths or patterns such as {self._example}")
        self._by_name = _by_name(found)
        return [(path, name) for name, path in sorted(self._by_name.items())]

    def path(self, name: str) -> str:
        """Return the current path of a file, by the relative path that `find` gave, perhaps in an earlier run.

        The file may be gone. Raises FileNotFoundError if `source.path` does not name it any more.
        """
        with self._lock:  # so that one of many threads looks
            if self._by_name is None:
                self._by_name = _by_name(self._expand(must_exist=False))
            if name not in self._by_name:
                raise FileNotFoundError(errno.ENOENT, "no file of this name matches source.path", name)
            return self._by_name[name]

    def _expand(self, must_exist: bool) -> set[str]:
        return {found for path in self._paths for found in _expand(native(path), self._example, must_exist)}


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
        if is_http(name):
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
    if is_url(pattern):
        try:
            matches = requested(pattern, lambda storage, path: list(map(storage.unstrip_protocol, storage.glob(path))))
        except OSError as error:
            raise InputError(f"source.path: cannot read {pattern}: {error.strerror or error}") from error
    else:
        matches = glob.glob(pattern, recursive=True, include_hidden=True)
    # Wildcards stand for no hidden name; a pattern may name one itself.
    return [match for match in matches if _num_hidden(match) <= _num_hidden(pattern)]


def _num_hidden(path: str) -> int:
    return sum(map(is_hidden, path.split("/")))


def _by_name(paths: set[str]) -> dict[str, str]:
    """Return the paths by what follows the deepest folder that holds them all."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    common = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    length = sum(len(level[0]) + 1 for level in common)
    return {plain(path, path[length:]): path for path in sorted(paths)}


# -- contents ----------------------------------------------------------------------------------------------------------


def open_stream(path: str) -> BinaryIO:
    """Open a file to scan, as a seekable stream.

    Raises InputError if there is no file or it may not be read, PomscaleError if storage fails.
    """
    path = native(path)
    try:
        raw = RemoteFile(path) if is_url(path) else _LocalFile(path)
    except OSError as error:
        raise InputError(f"source: cannot read {path}: {error.strerror or error}") from error
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def read_file(path: str) -> bytes:
    """Return the contents of a file. Raises the errors of `open_stream`."""
    with open_stream(path) as stream:
        return stream.read()


def compression(begin: bytes) -> str | None:
    """Return how a file is compressed whose first MAGIC_BYTES are given, or None."""
    return next((name for magic, name in _COMPRESSED.items() if begin.startswith(magic)), None)


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
    path = native(path)
    if is_url(path):
        with about_item():
            content = read_url(path)
        check_size(len(content), size)
        return io.BytesIO(content)
    return _open_checked(path, size)


def open_large_item(path: str, size: int) -> BinaryIO:
    """Open a file as `open_item` does, but fetch only the parts that are read, also behind a URL."""
    path = native(path)
    if not is_url(path):
        return _open_checked(path, size)
    with about_item():
        stream = io.BufferedReader(RemoteFile(path), _READ_AHEAD_BYTES)
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
        path = native(path)
        if is_url(path):
            with about_item():
                content = read_url(path, offset, offset + length)
            if len(content) > length:  # the server does not send parts, so this is all of the file
                check_size(len(content), file_size)
                content = content[offset : offset + length]
        else:
            if getattr(self._last, "path", None) != path:
                self._last.stream = _open_checked(path, file_size)
                self._last.path = path
            self._last.stream.seek(offset)
            content = self._last.stream.read(length)
        check_size(len(content), length)
        return content


def _open_checked(path: str, size: int | None) -> BinaryIO:
    with about_item():
        raw = _LocalFile(path)
    try:
        check_size(os.fstat(raw.fileno()).st_size, size)
    except SourceChangedError:
        raw.close()
        raise
    return io.BufferedReader(raw, _READ_AHEAD_BYTES)


def check_size(num_bytes: int, expected: int | None) -> None:
    """Raise SourceChangedError if a file does not have the size that the scan saw."""
    if expected is not None and num_bytes != expected:
        raise SourceChangedError(
            f"changed since it was listed ({expected:,} bytes then, {num_bytes:,} now); "
            f"encode into another output to take it in"
        )


class _LocalFile(io.FileIO):
    def __init__(self, path: str) -> None:
        """Open the file. Raises the errors of `faults.while_opening`."""
        with while_opening(path):
            super().__init__(path, "r")
        self._path = path

    def readinto(self, buffer: Any) -> int | None:
        with while_reading(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with while_reading(self._path):
            return super().readall()
