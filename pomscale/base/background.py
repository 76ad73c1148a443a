"""Calls made in a thread of their own, so that training does not wait for them, from a queue of limited length."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

CLOSE_TIMEOUT_S = 15.0  # a scheduler gives a job half a minute to end
PATIENT_CLOSE_TIMEOUT_S = 120.0  # where nobody waits for the end, and only a slow machine is in the way

logger = logging.getLogger(__name__)


class Background:
    """Makes calls one after another in a thread of its own.

    `do` never waits and never raises. A call that does not fit into the queue, since another one hangs or is too slow,
    is dropped. Calls that are dropped or raise an error are counted, with a warning at the first one and at the end: a
    log is worth less than the run. Calls that wait are lost if the process is killed, so a file is behind by the calls
    in the queue: milliseconds, unless one hangs.

    The thread never keeps the process from ending: it is a daemon, and `join` has a limit. A forked child has no such
    thread, so nothing happens there.
    """

    def __init__(self, name: str, most_waiting: int = 4096) -> None:
        """Start the thread. `name` says in every warning what the calls are for."""
        self._name = name
        self._most_waiting = most_waiting
        self._calls: deque[Callable[[], object]] = deque()
        self._last: Callable[[], object] | None = None
        self._has_news = threading.Condition()
        self._num_dropped = self._num_failed = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], object]) -> None:
        """Queue a call."""
        with self._has_news:
            fits = len(self._calls) < self._most_waiting and self._last is None
            if fits:
                self._calls.append(call)
                self._has_news.notify()
            else:
                self._num_dropped += 1
        if not fits and self._num_dropped == 1:
            logger.warning("%s does not keep up: entries are dropped from here on; the run goes on", self._name)

    def finish(self, last: Callable[[], object]) -> None:
        """Queue the last call; none is made after it. Returns at once: `join` waits."""
        with self._has_news:
            self._last = last
            self._has_news.notify()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the last call for some time, and return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def join(self, deadline_s: float) -> bool:
        """Wait for the last call until time.monotonic() is `deadline_s`, and return whether it has ended.

        Warns of the entries that are lost.
        """
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        num_lost = self._num_dropped + self._num_failed + len(self._calls)
        if num_lost:
            logger.warning(
                "%s lacks %d entries: %d were dropped, %d failed, %d are left behind",
                self._name,
                num_lost,
                self._num_dropped,
                self._num_failed,
                len(self._calls),
            )
        return not self._thread.is_alive()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            with self._has_news:
                self._has_news.wait_for(lambda: self._calls or self._last is not None)
                is_last = not self._calls
                call = self._last if is_last else self._calls.popleft()
            assert call is not None
            try:
                call()
            except (Exception, SystemExit) as error:  # a library may raise anything
                self._num_failed += 1
                if self._num_failed == 1:
                    logger.warning("%s fails; the run goes on", self._name, exc_info=error)
