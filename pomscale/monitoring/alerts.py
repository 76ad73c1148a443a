"""Decision when to alert people that something is wrong with a run: pure logic on numbers.

Monitor sends an alert to the console and to wandb, which sends a mail or a message as its user has set it up; Ledger
keeps it in events.jsonl.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

from pomscale.base.console import format_duration
from pomscale.config.monitoring import AlertsConfig
from pomscale.monitoring.monitor import Monitor
from pomscale.monitoring.sinks import Level
from pomscale.runs.ledger import Ledger

_QUIET_S = 3600.0  # time without another alert of the same kind
_LEAST_ROWS = 5  # rows needed before their median says how long a step takes
_MOST_ROWS = 1000
# Time, and at least two rows: one row may have a slow step, or be slow for the validation before its steps.
_SLOW_FOR_S = 60.0


class Alerts:
    """Alerts of one start. The trainer calls every method on every rank; only rank 0 sends alerts.

    Alerts within an hour of one of the same kind are not sent; the next one gives their number.
    """

    def __init__(
        self, config: AlertsConfig, monitor: Monitor, ledger: Ledger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._ledger = ledger
        self._clock = clock
        self._step_times: deque[float] = deque(maxlen=_MOST_ROWS)
        self._checked_s = clock()
        self._slow_since_s: float | None = None
        self._samples = 0
        self._sent_s: dict[str, float] = {}
        self._num_unsent: dict[str, int] = {}
        self._sending = threading.Lock()

    def restarted(self, samples: int, reason: str | None) -> None:
        """Tell that this start follows another, and the reason why that one ended; None at the first start."""
        self._samples = samples
        if reason is not None:
            self._send("requeued", f"continuing from {samples:,} samples: {reason}", "INFO")

    def left_out(self, samples: int, reason: str) -> None:
        """Tell that a step was left out, since its loss or gradient was not finite."""
        self._samples = samples
        self._send("not finite", f"a step is left out at {samples:,} samples: {reason}", "WARN")

    def went_back(self, samples: int, to_samples: int, reason: str) -> None:
        """Tell of a rollback."""
        self._samples = to_samples
        self._send("rollback", f"from {samples:,} back to {to_samples:,} samples: {reason}", "WARN")

    def late(self, reason: str) -> None:
        """Tell that there was no step for long. Called by the watchdog's thread, while all others may hang."""
        self._send("stall", f"after {self._samples:,} samples: {reason}", "ERROR")

    def check_row(self, samples: int, step_time_s: float | None) -> None:
        """Check speed and goodput at a row. step_time_s: mean since the row before; None if no step was taken since."""
        self._samples = samples
        if step_time_s is not None:
            self._check_step_time(step_time_s)
        self._check_goodput()

    def _check_step_time(self, step_time_s: float) -> None:
        factor, now_s = self._config.stall_factor, self._clock()
        median = statistics.median(self._step_times) if len(self._step_times) >= _LEAST_ROWS else math.inf
        if factor is None or step_time_s <= factor * median:
            self._slow_since_s = None
        elif self._slow_since_s is None:
            self._slow_since_s = self._checked_s
        elif (slow_s := now_s - self._slow_since_s) >= _SLOW_FOR_S:
            speed = f"{step_time_s:.3g} s per step, {step_time_s / median:.1f} times the median of this start"
            self._send("slow steps", f"at {self._samples:,} samples, for {slow_s:.0f} s: {speed}", "WARN")
        self._checked_s = now_s
        self._step_times.append(step_time_s)

    def _check_goodput(self) -> None:
        limit = self._config.min_goodput
        if limit is None:
            return
        seconds = self._ledger.goodput().seconds
        # Time in the queue, and time between starts (people may have left it for a weekend), is not the run's fault.
        wall_s = sum(seconds.values()) - seconds["queue"] - seconds["down"]
        if wall_s >= self._config.goodput_after_s and seconds["productive"] < limit * wall_s:
            share = seconds["productive"] / wall_s
            worst = max(
                (kind for kind in seconds if kind not in ("productive", "queue", "down")), key=seconds.__getitem__
            )
            self._send(
                "goodput",
                f"{share:.0%} of {format_duration(wall_s)} went into steps that count, wanted {limit:.0%}; "
                f"most of the rest is {worst}, {format_duration(seconds[worst])}",
                "WARN",
            )

    def _send(self, title: str, text: str, level: Level) -> None:
        with self._sending:
            now_s = self._clock()
            if now_s - self._sent_s.get(title, -math.inf) < _QUIET_S:
                self._num_unsent[title] = self._num_unsent.get(title, 0) + 1
                return
            self._sent_s[title] = now_s
            num_unsent = self._num_unsent.pop(title, 0)
        text += f" (and {num_unsent} times since the last alert)" if num_unsent else ""
        self._monitor.alert(self._samples, title, text, level)
        self._ledger.note("alert", self._samples, title=title, text=text, level=level)
