"""Signals that a guard, or a launcher of guards, hands on to its processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def block_signals() -> None:
    """Until a Forwarding is made, also by the program that this process becomes or its children, they wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


class SignalForwarder:
    """From construction on, requests to stop are noted and handed on by `send(number)`, which may be set later.

    first: name of the first of them, None as long as none came; asked_to_end: whether any of them was SIGTERM or
    Ctrl-C, after which nothing starts again. Takes the place of submitit's handlers, which would requeue the job at
    once and without a save.
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
