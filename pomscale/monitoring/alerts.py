"""When to tell people that something is wrong with a run. Pure logic on numbers; Monitor and Ledger tell and keep it.

An alert goes to wandb, which sends a mail or a message as its user has set it up, to the console, and to events.jsonl,
where it is kept.
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

_QUIET_S = 3600.0  # an alert of one kind, then none of that kind for so long
_LEAST_ROWS = 5  # whose median says how long a step takes
_MOST_ROWS = 1000
# And two rows at least: a step may hiccup, and a minute of one row may be the validation before its steps.
_SLOW_FOR_S = 60.0


class Alerts:
    """Of one incarnation. The trainer calls every method on every rank; on all but rank 0 nobody is told.

    Of what happens again within an hour of an alert of its kind, only the number is told, with the next alert.
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
        self._told_s: dict[str, float] = {}
        self._num_untold: dict[str, int] = {}
        self._telling = threading.Lock()

    def restarted(self, samples: int, reason: str | None) -> None:
        """This start follows another; reason: why that one ended, None at the first start."""
        self._samples = samples
        if reason is not None:
            self._tell("requeued", f"going on from {samples:,} samples: {reason}", "INFO")

    def left_out(self, samples: int, reason: str) -> None:
        """A step whose loss or gradient was not finite."""
        self._samples = samples
        self._tell("not finite", f"a step is left out at {samples:,} samples: {reason}", "WARN")

    def went_back(self, samples: int, to_samples: int, reason: str) -> None:
        """A rollback."""
        self._samples = to_samples
        self._tell("rollback", f"from {samples:,} back to {to_samples:,} samples: {reason}", "WARN")

    def late(self, reason: str) -> None:
        """No step for long. Called by the watchdog's thread, while all others may hang."""
        self._tell("stall", f"after {self._samples:,} samples: {reason}", "ERROR")

    def check_row(self, samples: int, step_time_s: float | None) -> None:
        """At every row. step_time_s: mean since the row before; None if no step was taken since."""
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
            told = f"{step_time_s:.3g} s per step, {step_time_s / median:.1f} times the median of this start"
            self._tell("slow steps", f"at {self._samples:,} samples, for {slow_s:.0f} s: {told}", "WARN")
        self._checked_s = now_s
        self._step_times.append(step_time_s)

    def _check_goodput(self) -> None:
        limit = self._config.min_goodput
        if limit is None:
            return
        seconds = self._ledger.goodput().seconds
        # A run can not help it that it waits in the queue, or that people have left it alone for a weekend.
        wall_s = sum(seconds.values()) - seconds["queue"] - seconds["down"]
        if wall_s >= self._config.goodput_after_s and seconds["productive"] < limit * wall_s:
            share = seconds["productive"] / wall_s
            worst = max(
                (kind for kind in seconds if kind not in ("productive", "queue", "down")), key=seconds.__getitem__
            )
            self._tell(
                "goodput",
                f"{share:.0%} of {format_duration(wall_s)} went into steps that count, wanted {limit:.0%}; "
                f"most of the rest is {worst}, {format_duration(seconds[worst])}",
                "WARN",
            )

    def _tell(self, title: str, text: str, level: Level) -> None:
        with self._telling:
            now_s = self._clock()
            if now_s - self._told_s.get(title, -math.inf) < _QUIET_S:
                self._num_untold[title] = self._num_untold.get(title, 0) + 1
                return
            self._told_s[title] = now_s
            num_untold = self._num_untold.pop(title, 0)
        text += f" (and {num_untold} times since the last alert)" if num_untold else ""
        self._monitor.alert(self._samples, title, text, level)
        self._ledger.note("alert", self._samples, title=title, text=text, level=level)
