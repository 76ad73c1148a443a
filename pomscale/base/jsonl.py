"""Files of JSON objects, one per line, to which lines are appended, and that survive kills and full disks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends objects to a file. A row is handed to the kernel before `append` returns, so a kill -9 loses none.

    In training a thread appends, see Background. On a full disk rows are kept in memory and tried again with the next
    one: a run is worth more than its log. Raises OSError when the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warned = False
        # Unbuffered: bytes that write() did not take are kept in _pending, so a full disk can never leave half a row in
        # the middle of the file.
        self._file = path.open("a+b", buffering=0)
        # A node that died while writing leaves half a line; start on a fresh one, or the next row would be lost too.
        self._pending = b"" if self._ends_with_newline() else b"\n"

    def _ends_with_newline(self) -> bool:
        size = self._file.seek(0, 2)
        if size == 0:
            return True
        self._file.seek(size - 1)
        return self._file.read(1) == b"\n"

    def append(self, row: dict[str, Any]) -> None:
        """Append a row. Raises ValueError for numbers that JSON lacks."""
        self._pending += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._write_pending()

    def _write_pending(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s cannot be written (%s): rows are kept in memory and tried again; they are lost if the "
                    "process is killed before there is space",
                    self._path,
                    error,
                )

    def close(self) -> None:
        """Write what is pending and close the file; bytes that the disk does not take are lost, with an error."""
        self._write_pending()
        if self._pending:
            logger.error("%s: %d bytes are lost: the disk is still full", self._path, len(self._pending))
        self._file.close()


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file (none without the file) and the number of unreadable lines.

    Half an object is never an object, so whatever parses as one was written whole.
    """
    objects: list[dict[str, Any]] = []
    num_unreadable = 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            num_unreadable += bool(line.strip())
    return objects, num_unreadable
