"""Watchdog that ends a process that hangs, with the stacks of its threads on disk.

One rank that is stuck holds all others in a collective, until NCCL gives up half an hour later without saying where
each one was. Here every rank watches itself: it writes its stacks while the hang lasts, and ends, so that the run
starts again.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

from pomscale.base.errors import PomscaleError
from pomscale.distributed.last_words import last_words

_EXIT_HUNG = 1


class Watchdog:
    """Context manager that ends the process unless `beat()` is called every `timeout_s` within its block.

    A thread looks at the clock. A thread that holds Python's lock for good (a C extension, a regular expression) would
    stop that one too, so faulthandler's timer, which needs no lock, is set a little later each time the thread looks.
    The timer writes the stacks and ends the process with code 1, but cannot call on_hang.

    `on_late(reason)`, which may be set later, is called by a thread when half of the time is over, once for each wait.
    Entering the block raises PomscaleError when stacks_path cannot be written.
    """

    def __init__(
        self, timeout_s: float | None, slow_timeout_s: float, stacks_path: Path, on_hang: Callable[[str], None]
    ) -> None:
        """Prepare to watch.

        Args:
            timeout_s: longest time between two beats; None watches nothing.
            slow_timeout_s: longest time until the first beat, and inside `slow()`.
            stacks_path: a file for this rank and start alone; it exists while the process is watched, and is kept if
                something was written.
            on_hang: called with the reason after the stacks are written, for at most 10 s in all; then the process
                ends with code 1.
        """
        self._timeout_s = timeout_s
        self._slow_timeout_s = slow_timeout_s
        self._stacks_path = stacks_path
        self._on_hang = on_hang
        self.on_late: Callable[[str], None] = lambda reason: None
        self._look_every_s = min(5.0, (timeout_s or 0.0) / 20)
        self._stacks: IO[bytes] | None = None
        self._last_s = 0.0
        self._has_begun = False
        self._slow: list[str] = []
        self._leaving = threading.Event()
        self._arming = threading.Lock()

    def __enter__(self) -> Watchdog:
        if self._timeout_s is not None:
            try:
                self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
                self._stacks = self._stacks_path.open("wb", buffering=0)
            except OSError as error:
                raise PomscaleError(f"cannot write {self._stacks_path}: {error}") from error
            self._last_s = time.monotonic()
            self._arm()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stacks is None:
            return
        with self._arming:
            self._leaving.set()
            faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()

    def beat(self) -> None:
        """Report that a step is done. Costs less than a microsecond, since it only reads the clock."""
        self._last_s = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            self._arm()  # until now the timer has the longer limit

    @contextmanager
    def slow(self, what: str) -> Iterator[None]:
        """Allow `slow_timeout_s` within the block, for work such as "validation"."""
        self._slow.append(what)
        self._last_s = time.monotonic()
        self._arm()  # the timer still has the shorter limit, and the thread may not get to change it
        try:
            yield
        finally:
            self._last_s = time.monotonic()
            self._slow.pop()
            self._arm()

    def _limit(self, share: float = 1.0) -> tuple[float, str]:
        """Return a share of the present limit in seconds, and the message for when it is over."""
        assert self._timeout_s is not None
        slow_s, limit_s = share * self._slow_timeout_s, share * self._timeout_s
        if self._slow:
            return slow_s, f"{self._slow[-1]} takes longer than {slow_s:g} s"
        if not self._has_begun:
            return slow_s, f"start-up and first step take longer than {slow_s:g} s"
        return limit_s, f"no step for {limit_s:g} s"

    def _watch(self) -> None:
        late_since_s = None  # time of the beat for which on_late was called last
        while not self._leaving.wait(self._look_every_s):
            last_s, (limit_s, reason) = self._last_s, self._limit()
            late_s, late = self._limit(0.5)
            waited_s = time.monotonic() - last_s
            if waited_s > limit_s:
                self._abort(reason)
            if waited_s > late_s and late_since_s != last_s:
                late_since_s = last_s
                self.on_late(late)
            self._arm()

    def _arm(self) -> None:
        """Set faulthandler's timer past the moment at which the thread would have ended the process."""
        with self._arming:
            if self._stacks is not None and not self._leaving.is_set():
                left_s = max(0.0, self._last_s + self._limit()[0] - time.monotonic())
                later_s = left_s + 2 * self._look_every_s + 1.0
                faulthandler.dump_traceback_later(later_s, file=self._stacks, exit=True)

    def _abort(self, reason: str) -> NoReturn:
        faulthandler.cancel_dump_traceback_later()  # this thread has Python's lock, so the timer is not needed any more
        last_words(f"hung: {reason}; stacks in {self._stacks_path}", lambda: self._record(reason))
        # A launcher ends all processes when the first is gone: let the other ranks write their stacks as well.
        time.sleep(2 * self._look_every_s)
        os._exit(_EXIT_HUNG)

    def _record(self, reason: str) -> None:
        assert self._stacks is not None
        names = "".join(f"Thread 0x{thread.ident or 0:016x}: {thread.name}\n" for thread in threading.enumerate())
        self._stacks.write(f"{reason}\n\n{names}\n".encode())
        faulthandler.dump_traceback(self._stacks)
        self._on_hang(reason)
