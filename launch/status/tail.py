"""Files that other processes append to: read their end, or what was added since the last look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def tail(path: Path, num_bytes: int) -> bytes:
    """Return the complete lines among the last bytes of a file; empty if there is no file."""
    try:
        with path.open("rb") as stream:
            stream.seek(_first_line(stream, os.fstat(stream.fileno()).st_size, num_bytes))
            return stream.read()
    except FileNotFoundError:
        return b""


def _first_line(stream: BinaryIO, size: int, num_bytes: int) -> int:
    """Return the position of the first line that lies completely in the last bytes."""
    if size <= num_bytes:
        return 0
    stream.seek(size - num_bytes - 1)
    return size - num_bytes - 1 + len(stream.readline())


def objects(lines: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects among the lines. A line that is none, or that a kill has cut off, is left out."""
    found = []
    for line in lines.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file, or no object in it, e.g. after a full disk."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Growing:
    """A file that grows, and that may not exist yet. It is read in complete lines."""

    def __init__(self, path: Path, *, num_bytes: int | None = None) -> None:
        """num_bytes: how much of its first content is read at most; None for all of it."""
        self.path = path
        self._num_bytes = num_bytes
        self._at: int | None = None  # position of the first byte that was not returned
        self._inode = 0

    def read(self) -> bytes:
        """Return what was added since the last call. A file that was replaced or cut off is read from the start."""
        try:
            with self.path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if self._at is None:
                    num_bytes = status.st_size if self._num_bytes is None else self._num_bytes
                    self._at = _first_line(stream, status.st_size, num_bytes)
                elif status.st_size < self._at or status.st_ino != self._inode:
                    self._at = 0
                self._inode = status.st_ino
                stream.seek(self._at)
                came = stream.read()
        except FileNotFoundError:
            return b""
        came = came[: came.rfind(b"\n") + 1]
        self._at += len(came)
        return came
