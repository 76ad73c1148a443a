"""`pomscale watch RUN`: one run, live, in a terminal. Each look reads only what was written since the last one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.record.job import log_path
from launch.scheduler.slurm import JobState
from launch.status.facts import Facts, read_facts
from launch.status.plot import plot
from launch.status.runs import RunSummary, ask_slurm, is_job_folder, summary
from launch.status.state import state_of
from launch.status.table import few
from launch.status.tail import Growing, objects
from pomscale.base.console import format_age, format_count, format_duration
from pomscale.base.errors import PomscaleError
from pomscale.runs.checkpoint_folder import complete_checkpoints, incomplete_checkpoints
from pomscale.runs.layout import CHECKPOINTS_FOLDER, EVENTS_FILE, METRICS_FILE, STARTS_FILE
from pomscale.runs.metric_names import GOODPUT_PREFIX, GOODPUT_SUFFIX, WALL_TIME

_EVERY_S, _ASK_SLURM_EVERY_S = 2.0, 30.0
_METRICS_BYTES, _EVENTS_BYTES, _LOG_BYTES = 8 << 20, 1 << 16, 1 << 14
_MAX_EVENTS, _MAX_LOG_LINES = 30, 200
# Sizes of the panels, borders included. The curves, the events and the log share the rest of the terminal.
_MIN_HEIGHT, _MIN_WIDTH, _ONCE_HEIGHT = 30, 60, 44
_HEADER_HEIGHT, _GOODPUT_HEIGHT, _MAX_CURVES_HEIGHT, _MAX_EVENTS_HEIGHT = 5, 5, 16, 10

# The colours of the report: green is productive time, grey is time in the queue or without a node.
_COLORS = {
    "productive": "green", "lost": "red", "queue": "bright_black", "down": "bright_black", "start_up": "blue",
    "compile": "bright_blue", "data_wait": "yellow", "checkpoint_stall": "magenta", "evaluation": "bright_yellow",
    "rollback": "bright_red", "other": "white",
}  # fmt: skip
_STATE_COLORS = {"running": "green", "finished": "bold green", "failed": "bold red", "killed": "bold red"}


def watch(job_folder: Path, *, once: bool, console: Console | None = None) -> None:
    """Show a run until Ctrl-C.

    Args:
        job_folder: Run folder; it may not exist yet.
        once: Show a single frame, as is also done without a terminal.
        console: Default: the terminal.
    """
    console = console or Console()
    view = _View(job_folder)
    if once or not console.is_terminal:
        console.print(view.frame(console.width, _ONCE_HEIGHT))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view.frame(console.width, console.height), refresh=True)
                time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        return


@dataclass
class _Curve:
    """A metric by number of samples, without the values that a run gave up when it went back."""

    samples: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, samples: int, value: float) -> None:
        self.go_back(samples - 1)
        self.samples.append(samples)
        self.values.append(value)

    def go_back(self, samples: int) -> None:
        while self.samples and self.samples[-1] > samples:
            self.samples.pop()
            self.values.pop()


class _View:
    def __init__(self, job_folder: Path) -> None:
        self._job_folder = job_folder
        self._metrics = Growing(job_folder / METRICS_FILE, num_bytes=_METRICS_BYTES)
        self._events_file = Growing(job_folder / EVENTS_FILE, num_bytes=_EVENTS_BYTES)
        self._starts_file = Growing(job_folder / STARTS_FILE)
        self._log_file = Growing(log_path(job_folder, 0), num_bytes=_LOG_BYTES)
        self._loss, self._speed = _Curve(), _Curve()
        self._start_number = 0
        self._start_samples: dict[int, int] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._log: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        self._jobs: Mapping[str, JobState] | None = None
        self._problem = ""
        self._asked_s: float | None = None

    def frame(self, width: int, height: int) -> RenderableType:
        """Return a frame of the size of the terminal, unless that is tiny."""
        width, height = max(width, _MIN_WIDTH), max(height, _MIN_HEIGHT)
        if not is_job_folder(self._job_folder):
            return _message(f"waiting for {self._job_folder}: no run has begun there yet. Ctrl-C ends this")
        try:
            facts = read_facts(self._job_folder)
            run = self._summary(facts)
            self._read()
        except (PomscaleError, OSError) as problem:
            return _message(str(problem))
        left = height - _HEADER_HEIGHT - _GOODPUT_HEIGHT - 1
        of_events = min(left // 4, _MAX_EVENTS_HEIGHT)
        of_curves = min((left - of_events) * 3 // 5, _MAX_CURVES_HEIGHT)
        return Group(
            _header(facts, run, self._problem),
            self._curves(width, of_curves),
            _goodput(facts, width),
            self._events_and_checkpoints(of_events),
            self._log_panel(left - of_events - of_curves),
        )

    def _summary(self, facts: Facts) -> RunSummary:
        """The folder is read at every look; SLURM is asked now and then."""
        now_unix_s, now_s = time.time(), time.monotonic()
        if self._asked_s is None or now_s - self._asked_s > _ASK_SLURM_EVERY_S:
            self._asked_s = now_s
            self._jobs, self._problem = ask_slurm([facts], now_unix_s)
        return summary(facts, self._job_folder.resolve().name, state_of(facts, self._jobs, now_unix_s), now_unix_s)

    def _read(self) -> None:
        for start in objects(self._starts_file.read()):
            self._start_samples[start["incarnation"]] = start["start_samples"]
        for row in objects(self._metrics.read()):
            self._add(row)
        self._events.extend(row for row in objects(self._events_file.read()) if "event" in row)
        self._log.extend(self._log_file.read().decode(errors="replace").splitlines())

    def _add(self, row: dict[str, Any]) -> None:
        """Add a row of metrics, in the way of pomscale.runs.history, but while the run continues."""
        if row.get("incarnation", -1) < self._start_number or "samples" not in row:
            return
        back_to = row["samples"] if "faults/rollbacks" in row else None
        if row["incarnation"] > self._start_number:
            self._start_number = row["incarnation"]
            back_to = self._start_samples.get(self._start_number, row["samples"] - 1)
        if back_to is not None:
            for curve in (self._loss, self._speed):
                curve.go_back(back_to)
        for name, curve in (("train/loss", self._loss), ("speed/samples_per_s", self._speed)):
            if name in row:
                curve.add(row["samples"], float(row[name]))

    def _curves(self, width: int, height: int) -> RenderableType:
        table = Table.grid(expand=True)
        table.add_column(ratio=1)
        table.add_column(ratio=1)
        panels = [
            _curve_panel(title, curve, width // 2 - 4, height)
            for title, curve in (("training loss", self._loss), ("images/s", self._speed))
        ]
        table.add_row(*panels)
        return table

    def _events_and_checkpoints(self, height: int) -> RenderableType:
        table = Table.grid(expand=True)
        table.add_column(ratio=2)
        table.add_column(ratio=1)
        events = [_event_line(row) for row in list(self._events)[-(height - 2) :]]
        checkpoints = _checkpoints(self._job_folder / CHECKPOINTS_FOLDER)[-(height - 2) :]
        table.add_row(_lines_panel("events", events, height), _lines_panel("checkpoints", checkpoints, height))
        return table

    def _log_panel(self, height: int) -> RenderableType:
        if not self._log_file.path.is_file():
            return _lines_panel("log", ["none yet: only runs that `pomscale launch` has started have logs"], height)
        return _lines_panel(f"log of rank 0: {self._log_file.path}", list(self._log)[-(height - 2) :], height)


def _checkpoints(root: Path) -> list[str]:
    """Describe the checkpoints: the complete ones, oldest first, then those that are not complete."""
    lines = []
    for path in complete_checkpoints(root):
        try:
            lines.append(f"{path.name}, {format_age(path.stat().st_mtime, time.time())}")
        except FileNotFoundError:
            continue  # deleted just now, for a newer one
    return lines + [f"{path.name}, not complete" for path in incomplete_checkpoints(root)]


def _message(text: str) -> Panel:
    return Panel(Text(text), title="pomscale watch")


def _header(facts: Facts, run: RunSummary, problem: str) -> Panel:
    hosts = facts.start.record.hosts if facts.start is not None and not facts.is_by_hand else []
    if not hosts and facts.claim is not None and facts.claim.host:
        hosts = [facts.claim.host]
    words = [f"start {run.num_starts}"]
    if facts.run_start is not None:
        num_ranks = facts.run_start["num_ranks"]
        words.append(f"{num_ranks} rank{'s' * (num_ranks > 1)} on {few(hosts) or facts.run_start['host']}")
    if run.job_id is not None:
        words.append(f"job {run.job_id}")
    if run.last_row_unix_s is not None:
        words.append(f"last row {format_age(run.last_row_unix_s, time.time())}")
    first = Text.assemble((run.state, _STATE_COLORS.get(run.state, "bold")), "  " + "  ·  ".join(words), no_wrap=True)
    why = Text(run.reason or problem, style="yellow", no_wrap=True, overflow="ellipsis")
    return Panel(Group(first, _progress(run), why), title=run.name, height=_HEADER_HEIGHT, title_align="left")


def _progress(run: RunSummary) -> RenderableType:
    if run.samples is None:
        return Text("no samples yet")
    if run.share is None:
        return Text(f"{run.samples:,} samples")
    eta = "" if run.eta_s is None else f"  done in {format_duration(run.eta_s)}"
    words = f"{run.share:6.1%}  {format_count(run.samples)} of {format_count(run.total_samples or 0)} samples{eta}"
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    table.add_row(ProgressBar(total=1.0, completed=run.share), Text(words))
    return table


def _curve_panel(title: str, curve: _Curve, width: int, height: int) -> Panel:
    if not curve.samples:
        return _lines_panel(title, ["nothing yet"], height)
    drawn = plot(curve.samples, curve.values, width, height - 3)
    under = f"{format_count(curve.samples[0])} .. {format_count(curve.samples[-1])} samples"
    return _lines_panel(f"{title} {curve.values[-1]:.4g}", [*drawn, under.rjust(width)], height)


def _goodput(facts: Facts, width: int) -> Panel:
    shares = {kind: facts.latest(f"{GOODPUT_PREFIX}{kind}{GOODPUT_SUFFIX}") or 0.0 for kind in WALL_TIME}
    shares = {kind: share for kind, share in shares.items() if share > 0}
    bar, legend, filled, begin = Text(no_wrap=True), Text(), 0, 0.0
    for kind, share in shares.items():
        begin += share
        end = round(begin * (width - 4))
        bar.append("█" * (end - filled), style=_COLORS[kind])
        filled = max(filled, end)
        legend.append(f"■ {kind.replace('_', ' ')} {share:.1%}  ", style=_COLORS[kind])
    if not shares:
        legend.append("nothing yet")
    return Panel(Group(bar, legend), title="wall time", height=_GOODPUT_HEIGHT, title_align="left")


def _event_line(row: dict[str, Any]) -> str:
    shown = ("reason", "title", "text", "signal", "path")
    details = "  ".join(str(row[key]) for key in shown if row.get(key))
    when = time.strftime("%d %b %H:%M", time.localtime(row.get("time_unix_s", 0)))
    return f"{when}  {str(row['event']).replace('_', ' ')} at {format_count(row.get('samples', 0))}  {details}"


def _lines_panel(title: str, lines: Sequence[str], height: int) -> Panel:
    # Colours of a log stay in their line, and what moves a terminal's cursor is left out.
    text = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
    return Panel(text, title=title, height=height, title_align="left")
