"""Requests to stop: the signal handler only sets a flag; ranks agree on it at a step boundary.

A save inside a handler would be a collective entered by one rank alone, and would hang the others.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C. A second signal of the same kind ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
