"""Console output: lines and warnings that cannot end a run, progress bars, and numbers as people read them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")


def say(line: str) -> None:
    """Print a line on standard output; a full disk or a reader that has gone is no reason to end."""
    with suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """Print a warning on standard error; a full disk or a reader that has gone is no reason to end."""
    with suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


class Progress:
    """Progress of long work on standard error: a bar on a terminal, a line now and then in a log.

    It is shown while its block lasts. `note` is shown with the figures; the caller may set it before `advance`.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: Literal["items", "bytes"] = "items",
        enabled: bool = True,
        every_s: float = 30.0,
    ) -> None:
        """Prepare to show progress.

        Args:
            label: what is made, in the plural ("videos"), or what is done ("verify").
            total: number of items or bytes of the whole work.
            unit: what is counted; bytes are shown in GB.
            enabled: False shows nothing, and still counts.
            every_s: seconds between two lines in a log, beside the first and the last one.
        """
        self.note = ""
        self.num_done = 0
        self._label, self._total, self._unit, self._every_s = label, total, unit, every_s
        self._num_skipped = 0
        self._begun_s = self._shown_s = time.monotonic()
        self._num_shown: int | None = None
        is_terminal = sys.stderr.isatty()
        self._in_lines = enabled and not is_terminal
        self._bar = _terminal_bar() if enabled and is_terminal else None
        self._task = self._bar.add_task(label, total=total, status="") if self._bar is not None else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._in_lines and self._num_shown not in (None, self.num_done):
            self._print_line()

    def begin(self) -> None:
        """Measure rate and ETA from now on."""
        self._begun_s = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Count items or bytes that are done."""
        self.num_done += amount
        self._show()

    def skip(self, amount: int) -> None:
        """Count items or bytes that were done before: they do not count in the rate."""
        self._num_skipped += amount
        self.num_done += amount
        self._show()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began, more than 0."""
        return max(time.monotonic() - self._begun_s, 1e-9)

    @property
    def rate_per_s(self) -> float:
        """Items or bytes per second since the work began."""
        return (self.num_done - self._num_skipped) / self.elapsed_s

    @property
    def eta_s(self) -> float:
        """Seconds until all is done, at the rate so far; infinity without a rate."""
        num_left = self._total - self.num_done
        if not num_left:
            return 0.0
        return num_left / self.rate_per_s if self.rate_per_s > 0 else float("inf")

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.num_done, status=self._status())
        elif self._in_lines:
            is_first, is_last = self._num_shown is None, self.num_done == self._total != self._num_shown
            if is_first or is_last or time.monotonic() - self._shown_s >= self._every_s:
                self._print_line()

    def _print_line(self) -> None:
        self._shown_s, self._num_shown = time.monotonic(), self.num_done
        with suppress(OSError):
            print(f"{self._label}: {self._status()}", file=sys.stderr, flush=True)

    def _status(self) -> str:
        """Return e.g. "3 of 40, 12 s each, ETA 7m 24s" or "1.20 of 9.50 GB, 0.31 GB/s, ETA 26s"."""
        rate = self.rate_per_s
        if self._unit == "bytes":
            parts = [f"{self.num_done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB", f"{rate / 1e9:.2f} GB/s"]
        else:
            speed = f"{rate:,.0f}/s" if rate >= 10 else f"{1 / rate:.3g} s each" if rate > 0 else "0/s"
            parts = [f"{self.num_done:,} of {self._total:,}", speed]
        eta = format_duration(self.eta_s) if rate > 0 else "?"
        return ", ".join([*parts, *([self.note] if self.note else []), f"ETA {eta}"])


def track(values: Iterable[T], label: str, total: int, *, enabled: bool = True) -> Iterator[T]:
    """Yield the values and show the progress; a value is done when the next one is asked for."""
    with Progress(label, total, enabled=enabled) as progress:
        for value in values:
            yield value
            progress.advance()


def _terminal_bar() -> Any:
    # Imported here, since most who print a line never show a bar.
    from rich import progress  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[status]}"),
    )
    return progress.Progress(*columns, console=Console(stderr=True))


def format_count(count: float) -> str:
    """Return a count with three significant digits: 950, 8.19k, 1.28M, 2.5B."""
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.5 thousand would round to "1e+03k": it belongs to the next unit.
        if abs(count) >= 0.9995 * factor:
            return f"{count / factor:.3g}{suffix}"
    return f"{count:.3g}"


def format_age(then_unix_s: float, now_unix_s: float) -> str:
    """Return how long ago a moment was; clocks of other hosts may be ahead."""
    return f"{format_duration(max(0.0, now_unix_s - then_unix_s))} ago"


def format_duration(seconds: float) -> str:
    """Return the two largest units of a duration: 42s, 3m 20s, 5h 07m, 2d 04h."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {total % 60:02d}s"
    return f"{total}s"
