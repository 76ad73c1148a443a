"""Progress of an encode: the bar or lines of `base.console.Progress`, and rows for metrics.jsonl and wandb."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from pomscale.base.console import Progress
from pomscale.monitoring.monitor import Monitor

_REPORT_EVERY_S = 10.0


class EncodeProgress:
    """Counts items, bytes, failures and waiting, and shows them on stderr and in `monitor`, whose clock is items done.

    `enabled=False` shows nothing on stderr. Used by the encoding thread and the writing thread.
    """

    def __init__(self, num_items: int, enabled: bool, monitor: Monitor) -> None:
        self.num_failed = self.num_cut = 0
        self.has_audio = False
        """Whether clips have sound, which is ignored."""
        self._num_bytes = 0
        self._waited_s = 0.0
        self._reported_s = time.monotonic()
        self._has_begun = False
        self._lock = threading.Lock()
        self._monitor = monitor
        self._progress = Progress("encode", num_items, enabled=enabled, every_s=_REPORT_EVERY_S)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, traceback)
        if kind is None:
            self._report()

    def begin(self) -> None:
        """Begin to measure the speed, with the first part: looking at finished parts before it is not encoding."""
        if not self._has_begun:
            self._has_begun = True
            self._progress.begin()

    def cut(self, num_captions: int) -> None:
        """Count captions that had more tokens than are kept."""
        self.num_cut += num_captions

    def advance(self, num_bytes: int, num_items: int = 1) -> None:
        """Count a record that was written; `num_items` is 0 where its item was counted already."""
        with self._lock:
            self._num_bytes += num_bytes
            self._show(num_items)

    def fail(self, was_encoded: bool = False) -> None:
        """Count an item that was given up, perhaps after `advance` had counted it: it failed in a later size."""
        with self._lock:
            self.num_failed += 1
            self._show(int(not was_encoded))

    def skip(self, num_items: int) -> None:
        """Count items of a part that is finished, or another task's: they are done but do not count in the speed."""
        with self._lock:
            self._show(0, num_items)

    def waited(self, seconds: float) -> None:
        """Count time in which the networks had nothing to do, since decoding or writing did not keep up."""
        self._waited_s += seconds

    @property
    def busy_share(self) -> float:
        """Share of the time since the start in which the networks were not waiting for decoding or writing."""
        return max(0.0, 1.0 - self._waited_s / self._progress.elapsed_s)

    @property
    def items_per_s(self) -> float:
        """Items encoded or given up per second since the start."""
        return self._progress.rate_per_s

    def _show(self, num_done: int, num_skipped: int = 0) -> None:
        self._progress.note = (
            f"{self._num_bytes / 1e9:.3f} GB, {self.num_failed:,} failed, encoder busy {self.busy_share:.0%}"
        )
        if num_skipped:
            self._progress.skip(num_skipped)
        else:
            self._progress.advance(num_done)
        if time.monotonic() - self._reported_s > _REPORT_EVERY_S:
            self._report()

    def _report(self) -> None:
        self._reported_s = time.monotonic()
        self._monitor.log(
            self._progress.num_done,
            {
                "encode/seconds": self._progress.elapsed_s,
                "encode/items_per_s": self.items_per_s,
                "encode/gigabytes": self._num_bytes / 1e9,
                "encode/failed": self.num_failed,
                "encode/captions_cut": self.num_cut,
                "encode/busy_share": self.busy_share,
                "encode/eta_s": self._progress.eta_s,
            },
        )
