"""How far an encode is: a bar on a terminal, a line now and then in a log, rows for metrics.jsonl and wandb."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pomscale.monitoring.monitor import Monitor

_REPORT_EVERY_S = 10.0


class EncodeProgress:
    """Counts items, bytes, failures and waiting, and shows them on stderr and in `monitor`, whose clock is items done.

    `enabled=False` shows nothing on stderr. Used by the encoding thread and the writing thread.
    """

    def __init__(self, num_items: int, enabled: bool, monitor: Monitor) -> None:
        self._num_items = num_items
        self._num_encoded = self._num_failed = self._num_skipped = self._num_bytes = 0
        self._waited_s = 0.0
        self._start = self._last_report = time.monotonic()
        self._has_begun = False
        self.num_cut = 0
        self._lock = threading.Lock()
        self._monitor = monitor
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
        if kind is None:
            self._report()

    def begin(self) -> None:
        """The first part is begun. What came before, e.g. looking at finished ones, does not count in the speed."""
        if not self._has_begun:
            self._has_begun, self._start = True, time.monotonic()

    def cut(self, num_captions: int) -> None:
        """Captions that had more tokens than are kept."""
        self.num_cut += num_captions

    def advance(self, num_bytes: int, num_items: int = 1) -> None:
        """A record was written; `num_items` is 0 where its item was counted already."""
        with self._lock:
            self._num_bytes += num_bytes
            self._num_encoded += num_items
            self._show()

    def fail(self, was_encoded: bool = False) -> None:
        """One item was given up, perhaps after `advance` had counted it: it fails in a later one of several sizes."""
        with self._lock:
            self._num_failed += 1
            self._num_encoded -= int(was_encoded)
            self._show()

    def skip(self, num_items: int) -> None:
        """Items of a part that is finished, or another task's: they count as done but not towards the speed."""
        with self._lock:
            self._num_skipped += num_items
            self._show()

    def waited(self, seconds: float) -> None:
        """The networks had nothing to do, since decoding or writing did not keep up."""
        self._waited_s += seconds

    @property
    def busy_share(self) -> float:
        """Share of the time since the start in which the networks were not waiting for decoding or writing."""
        return max(0.0, 1.0 - self._waited_s / self._elapsed_s)

    @property
    def num_failed(self) -> int:
        return self._num_failed

    @property
    def items_per_s(self) -> float:
        """Items encoded or given up per second since the start."""
        return (self._num_encoded + self._num_failed) / self._elapsed_s

    @property
    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    @property
    def _num_done(self) -> int:
        return self._num_encoded + self._num_failed + self._num_skipped

    @property
    def _eta_s(self) -> float:
        num_left = self._num_items - self._num_done
        if not num_left:
            return 0.0
        return num_left / self.items_per_s if self.items_per_s else float("inf")

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._num_done, status=self._status())
        if time.monotonic() - self._last_report > _REPORT_EVERY_S:
            self._report()

    def _report(self) -> None:
        self._last_report = time.monotonic()
        if self._lines:
            print(f"encode: {self._num_done:,} of {self._num_items:,}, {self._status()}", file=sys.stderr)
        self._monitor.log(
            self._num_done,
            {
                "encode/seconds": self._elapsed_s,
                "encode/items_per_s": self.items_per_s,
                "encode/gigabytes": self._num_bytes / 1e9,
                "encode/failed": self._num_failed,
                "encode/captions_cut": self.num_cut,
                "encode/busy_share": self.busy_share,
                "encode/eta_s": self._eta_s,
            },
        )

    def _status(self) -> str:
        eta = timedelta(seconds=round(self._eta_s)) if self.items_per_s else "?"
        return (
            f"{self.items_per_s:,.0f} items/s, {self._num_bytes / 1e9:.3f} GB, {self._num_failed:,} failed, "
            f"encoder busy {self.busy_share:.0%}, ETA {eta}"
        )
