"""Requests to stop: signals that a guard, or a launcher of guards, forwards to its processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def block_signals() -> None:
    """Block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 until a SignalForwarder is made.

    They stay blocked, and pending, across exec and in child processes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


class SignalForwarder:
    """Handler of requests to stop: notes them, and forwards each by `send(number)`, which may be set later.

    first: name of the first signal that came; None as long as none did. asked_to_end: whether one of them was SIGTERM
    or SIGINT, after which nothing starts again. This replaces submitit's handlers, which would requeue the job at once
    and without a save.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self.asked_to_end = False
        self.send: Callable[[int], None] | None = None
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name
        self.asked_to_end = self.asked_to_end or number in (signal.SIGTERM, signal.SIGINT)
        if self.send is not None:
            self.send(number)
