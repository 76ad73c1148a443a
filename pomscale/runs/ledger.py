"""Wall time of a run by what it was spent on, over all its starts: RUN/events.jsonl and its balance.

Every line has samples, time_unix_s and incarnation (the number of the start), and one of

    "start": {...}     once per start: when its job was submitted and began, as far as known, and its process
    "seconds": {...}   the wall time since the line before, by what it was spent on (`Kind`)
    "event": name      something that happened, with its details; an "alert" was also sent to people (see alerts.py)
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pomscale.base.background import Background
from pomscale.base.jsonl import JsonLines, read_json_lines
from pomscale.runs.layout import EVENTS_FILE
from pomscale.runs.metric_names import WALL_TIME, goodput_share

Kind = Literal["start_up", "compile", "data_wait", "step", "checkpoint_stall", "evaluation", "rollback", "other"]
"""Kinds that time is charged to; metric_names.WALL_TIME divides "step" into "productive" and "lost"."""

SUBMITTED = "POMSCALE_SUBMITTED_UNIX_S"
"""Environment variable: when the job was submitted, set by the command that submitted it."""

RESTARTED_BECAUSE = "POMSCALE_RESTARTED_BECAUSE"
"""Environment variable: why the start before this one ended, set by the launcher. Absent at the first start."""

_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Goodput:
    """Wall time by kind (of WALL_TIME), from the first submission to the last line, and the number of each event."""

    seconds: dict[str, float]
    events: Counter[str]

    @property
    def productive_share(self) -> float:
        """Share of all wall time in steps that count, queue and pauses included, 0 to 1."""
        total = sum(self.seconds.values())
        return self.seconds["productive"] / total if total else 0.0

    def metrics(self) -> dict[str, float]:
        """Return goodput/*: the share of all wall time of each kind that took any."""
        total = sum(self.seconds.values())
        return {goodput_share(kind): seconds / total for kind, seconds in self.seconds.items() if seconds}


class Ledger:
    """Writes the lines of one start, and keeps the balance of all starts. Without a folder it does nothing.

    Each `charge` charges the time since the one before it, so that all charges add up to the wall time. Kernels run
    asynchronously on a GPU: charge right after something that waits for the device.

    A thread writes the lines, so that training does not wait for the disk; see Background. Never raises for a full
    disk; raises OSError when the file cannot be opened.
    """

    def __init__(self, run_folder: Path | None, start: int, start_samples: int) -> None:
        self._start = start
        self._file: JsonLines | None = None
        self._seconds: dict[str, float] = {}
        self._balance = _Balance()
        self._appending = threading.Lock()
        if run_folder is None:
            return
        for row in read_json_lines(run_folder / EVENTS_FILE)[0]:
            self._balance.add(row)
        self._file = JsonLines(run_folder / EVENTS_FILE)
        self._writer = Background(EVENTS_FILE)
        age_s = _process_age_s()
        self._charged_s = time.monotonic() - age_s
        self._append(start_samples, {"start": _moments(os.environ, time.time() - age_s)})

    def charge(self, kind: Kind) -> None:
        """Charge the time since the last charge, or since the start of the process, to a kind."""
        if self._file is not None:
            now_s = time.monotonic()
            self._seconds[kind] = self._seconds.get(kind, 0.0) + now_s - self._charged_s
            self._charged_s = now_s

    def write(self, samples: int) -> None:
        """Write a line with all that was charged since the last one, at `samples` seen so far."""
        if self._seconds:
            seconds = {kind: round(seconds, 6) for kind, seconds in self._seconds.items()}
            self._seconds.clear()
            self._append(samples, {"seconds": seconds})

    def event(self, name: str, samples: int, **details: str | float) -> None:
        """Write an event, e.g. "rollback" with to_samples: steps beyond those samples do not count any more."""
        self.write(samples)
        self._append(samples, {"event": name, **details})

    def note(self, name: str, samples: int, **details: str | float) -> None:
        """Write an event that leaves the steps as they are, from any thread."""
        self._append(samples, {"event": name, **details})

    def goodput(self) -> Goodput:
        """Return the balance over all starts, up to the last line."""
        with self._appending:
            return self._balance.goodput()

    def metrics(self) -> dict[str, float]:
        """Return goodput/* over all starts, up to the last line."""
        return self.goodput().metrics()

    def _append(self, samples: int, content: dict[str, Any]) -> None:
        if self._file is None:
            return
        row = {"samples": samples, "time_unix_s": round(time.time(), 3), "incarnation": self._start, **content}
        with self._appending:
            self._balance.add(row)
            self._writer.do(partial(self._file.append, row))

    def close(self) -> None:
        """Write what is left; takes _CLOSE_TIMEOUT_S at most."""
        if self._file is not None:
            self.charge("other")
            self.write(self._balance.samples)
            self._writer.finish(self._file.close)
            self._writer.join(time.monotonic() + _CLOSE_TIMEOUT_S)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _process_age_s() -> float:
    """Return the age to a clock tick; psutil's create_time, which adds a boot time of whole seconds, is 1 s off."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def _moments(environment: Mapping[str, str], process_started_unix_s: float) -> dict[str, float]:
    """Return when a start was submitted, its job began and its process began, in Unix seconds, as far as known."""
    start = {"process_unix_s": round(process_started_unix_s, 3)}
    for name, variable in (("submitted_unix_s", SUBMITTED), ("job_unix_s", "SLURM_JOB_START_TIME")):
        if environment.get(variable):
            start[name] = float(environment[variable])
    return start


def goodput(run_folder: Path) -> Goodput | None:
    """Return the balance of a run folder over all its starts; None if it has no ledger."""
    rows, _ = read_json_lines(run_folder / EVENTS_FILE)
    if not rows:
        return None
    balance = _Balance()
    for row in rows:
        balance.add(row)
    return balance.goodput()


@dataclass(frozen=True)
class _Steps:
    """Seconds of the steps that led from one number of samples to another."""

    begin: int
    end: int
    seconds: float


class _Balance:
    """Sums of the lines of a ledger, which are added in the order in which they were written."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(WALL_TIME, 0.0)
        self._events: Counter[str] = Counter()
        self._kept: list[_Steps] = []  # `end` increases
        self._start = -1
        self.samples = 0
        self._until_unix_s: float | None = None  # up to where wall time is accounted for

    def add(self, row: dict[str, Any]) -> None:
        if row["incarnation"] < self._start:
            return  # of a process that outlived its replacement
        self._start = row["incarnation"]
        if "start" in row:
            self._go_back(row["samples"])
            self._begin(row["start"])
        elif "seconds" in row:
            self._spend(row["samples"], row["seconds"])
        else:
            self._events[row["event"]] += 1
            if "to_samples" in row:
                self._go_back(row["to_samples"])

    def _begin(self, start: dict[str, float]) -> None:
        """Account for the time between the start before, or the submission, and the process of this start.

        A job that is started again inside its allocation still has the old job_unix_s, and one that was requeued the
        old submitted_unix_s.
        """
        process = start["process_unix_s"]
        submitted, job = (min(start.get(key, 0.0), process) for key in ("submitted_unix_s", "job_unix_s"))
        if self._until_unix_s is None:
            self._until_unix_s = min(moment for moment in (submitted, job, process) if moment)
        until = min(self._until_unix_s, process)
        if max(submitted, job) >= until:  # the scheduler took part: the job waited in a queue
            queued_from = max(until, submitted)
            began = max(job if job >= until else process, queued_from)
            self._seconds["down"] += queued_from - until
            self._seconds["queue"] += began - queued_from
            self._seconds["start_up"] += process - began
        else:
            self._seconds["down"] += process - until
        self._until_unix_s = process

    def _spend(self, samples: int, seconds: dict[str, float]) -> None:
        for kind, spent in seconds.items():
            if kind != "step":
                self._seconds[kind] += spent
        steps = _Steps(self.samples, samples, seconds.get("step", 0.0))
        if steps.end > steps.begin:
            self._kept.append(steps)
        self._seconds["productive" if steps.end > steps.begin else "lost"] += steps.seconds
        self.samples = samples
        if self._until_unix_s is not None:
            self._until_unix_s += sum(seconds.values())

    def _go_back(self, samples: int) -> None:
        """Move the time of steps beyond these samples from "productive" to "lost"."""
        while self._kept and self._kept[-1].end > samples:
            steps = self._kept.pop()
            lost = steps.seconds
            if steps.begin < samples:
                lost *= (steps.end - samples) / (steps.end - steps.begin)
                self._kept.append(_Steps(steps.begin, samples, steps.seconds - lost))
            self._seconds["productive"] -= lost
            self._seconds["lost"] += lost
        self.samples = samples

    def goodput(self) -> Goodput:
        return Goodput(dict(self._seconds), Counter(self._events))
