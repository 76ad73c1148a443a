"""Requests to stop: a signal only sets a flag, on which the ranks agree at a step boundary.

A save inside a handler would be a collective that one rank enters alone, and would hang the others.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

from pomscale.distributed.last_words import last_words

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

EXIT_STOPPED = 75
"""Exit code of a run that stopped on request and lost nothing: the same command continues it."""

# Where a scheduler signals all processes of a job, torchrun at once sends its own children the same signal again.
_DUPLICATE_S = 2.0

# The kernel notes when a signal has come (unix(7), SO_TIMESTAMPNS of socket(7)): a thread that waits for Python's lock
# may read two of them at once that came minutes apart.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@qq")

_current: StopRequest | None = None


class StopRequest:
    """Flag that SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C sets. Must be made in the main thread.

    The same signal a second time, 2 s or more after the first, ends the process at once with code 128 + its number;
    files that are complete on disk stay complete. This works while the main thread computes, compiles or waits in a
    collective, where Python's own handlers do not run: a thread reads the signals from a socket.

    `on_quit(reason)` is called before such an end, for at most 10 s. While `nothing_to_save`, the first signal ends the
    process, with code 75.
    """

    def __init__(self, *, nothing_to_save: bool = False) -> None:
        global _current  # noqa: PLW0603  signals belong to the process, and so does their one handler
        self.signal_name: str | None = None
        self.nothing_to_save = nothing_to_save
        self.on_quit: Callable[[str], None] | None = None
        # SEQPACKET: one packet, with its time, for each signal; and an end when the writer is closed.
        reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._writer.setblocking(False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), name="stop request", daemon=True).start()
        _current = self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _read(self, reader: socket.socket) -> None:
        """Read every signal of the process, one packet each, until the socket is closed."""
        first: dict[int, float] = {}
        with reader:
            while True:
                received, notes, _, _ = reader.recvmsg(1, socket.CMSG_SPACE(_TIMESPEC.size))
                if not received:
                    return
                number = received[0]
                if number not in SIGNALS:
                    continue
                self._handle(number, None)
                if self.nothing_to_save:
                    last_words(f"{self.signal_name}: stopped before the work began; run the same command again", None)
                    os._exit(EXIT_STOPPED)
                came_s = _seconds(notes[0][2]) if notes else time.time()  # a kernel that is imitated may note nothing
                if came_s - first.setdefault(number, came_s) >= _DUPLICATE_S:
                    self._quit(number)

    def _quit(self, number: int) -> None:
        reason = f"{self.signal_name} twice: ended at once, without a save"
        last_words(reason, partial(self.on_quit, reason) if self.on_quit is not None else None)
        os._exit(128 + number)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None

    def restore(self, *, process_ends: bool = False) -> None:
        """Restore the signal handlers of before.

        Args:
            process_ends: ignore requests instead, since the process is about to end: torchrun sends SIGTERM as soon as
                another rank has ended, which would cost this one its last line.
        """
        global _current  # noqa: PLW0603
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if process_ends else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        _current = None


def _seconds(timespec: bytes) -> float:
    seconds, nanoseconds = _TIMESPEC.unpack(timespec)
    return float(seconds + nanoseconds / 1e9)


def _in_forked_child() -> None:
    """Leave the parent's socket, which a fork shares: a signal to the child would stop the parent."""
    if _current is not None:
        _current.restore()


os.register_at_fork(after_in_child=_in_forked_child)
