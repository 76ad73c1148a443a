"""Last message and record of a process that must end at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_LIMIT_S = 10.0


def last_words(line: str, record: Callable[[], None] | None) -> None:
    """Write a line to stderr and call `record`, for at most 10 s in all: the disk may be why the process hangs."""

    def speak() -> None:
        os.write(2, f"{line}\n".encode())  # not sys.stderr: another thread may hold its lock for good
        if record is not None:
            record()

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(_LIMIT_S)
