"""Files that others append to: their end, and what they have gained since one last looked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def tail(path: Path, num_bytes: int) -> bytes:
    """The whole lines among the last bytes of a file; empty without the file."""
    try:
        with path.open("rb") as stream:
            stream.seek(_first_line(stream, os.fstat(stream.fileno()).st_size, num_bytes))
            return stream.read()
    except FileNotFoundError:
        return b""


def _first_line(stream: BinaryIO, size: int, num_bytes: int) -> int:
    """Where the first line begins of which all lies in the last bytes."""
    if size <= num_bytes:
        return 0
    stream.seek(size - num_bytes - 1)
    return size - num_bytes - 1 + len(stream.readline())


def objects(lines: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the lines; a line that a kill has cut off, or that is none, is left out."""
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
    """The JSON object in a file; None without it, and where it is none, e.g. since a disk was full."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Growing:
    """A file that grows, and that may not be there yet. Gives out whole lines: half of one waits for its end."""

    def __init__(self, path: Path, *, num_bytes: int | None = None) -> None:
        """num_bytes: of what is there when it is first seen, at most; None = all of it."""
        self.path = path
        self._num_bytes = num_bytes
        self._at: int | None = None  # of the first byte that was not given out
        self._inode = 0

    def read(self) -> bytes:
        """What came since the last call. A file that was replaced, or cut off, is read from its beginning."""
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
