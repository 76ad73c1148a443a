"""How far an encode is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_EVERY_S = 10.0


class EncodeProgress:
    """Counts items, bytes and failures, and shows them on stderr. `enabled=False` shows nothing."""

    def __init__(self, num_items: int, enabled: bool) -> None:
        self._num_items = num_items
        self._num_encoded = self._num_failed = self._num_skipped = self._num_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not enabled or self._lines)
        self._task = self._bar.add_task("encode", total=num_items, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._lines and kind is None:
            self._print_line()

    def advance(self, num_bytes: int) -> None:
        """One item was written."""
        self._num_bytes += num_bytes
        self._num_encoded += 1
        self._show()

    def fail(self) -> None:
        """One item was given up."""
        self._num_failed += 1
        self._show()

    def skip(self, num_items: int) -> None:
        """Items of a part that an earlier run finished: they count as done but not towards the speed."""
        self._num_skipped += num_items
        self._show()

    @property
    def _num_done(self) -> int:
        return self._num_encoded + self._num_failed + self._num_skipped

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._num_done, status=self._status())
        if self._lines and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"encode: {self._num_done:,} of {self._num_items:,}, {self._status()}", file=sys.stderr)

    def _status(self) -> str:
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        rate = (self._num_encoded + self._num_failed) / elapsed_s
        eta = timedelta(seconds=round((self._num_items - self._num_done) / rate)) if rate else "?"
        return f"{rate:,.0f} items/s, {self._num_bytes / 1e9:.3f} GB, {self._num_failed:,} failed, ETA {eta}"
