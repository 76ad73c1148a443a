"""How far long work is, for people who wait for it."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console

from pomscale.base.console import format_duration

_TELL_EVERY_S = 30.0


class Progress:
    """A bar on a terminal; in a log a line now and then. On stderr, while its block lasts."""

    def __init__(self, things: str, total: int) -> None:
        """things: what is made, in the plural."""
        self._things, self._total, self._num_done = things, total, 0
        self._begun_s = self._told_s = time.monotonic()
        columns = (bars.TextColumn(things), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        self._lines = not sys.stderr.isatty()
        self._bar = bars.Progress(*columns, console=Console(stderr=True), disable=self._lines)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more is there."""
        self._num_done += 1
        self._bar.advance(self._task)
        now_s = time.monotonic()
        is_last = self._num_done == self._total
        if self._lines and (is_last or self._num_done == 1 or now_s - self._told_s >= _TELL_EVERY_S):
            self._told_s = now_s
            each_s = (now_s - self._begun_s) / self._num_done
            left = format_duration(each_s * (self._total - self._num_done))
            done = f"{self._num_done:,} of {self._total:,}"
            print(f"{self._things}: {done}, {each_s:.3g} s each, {left} left", file=sys.stderr, flush=True)
