"""`pomscale runs status`: an overview of one run on one screen."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from launch.record.job import JobStart, read_starts
from launch.record.moved import train_command
from launch.status.facts import Facts, read_facts
from launch.status.runs import RunSummary, ask_slurm, summary
from launch.status.state import LIVE, state_of
from launch.status.table import NOTHING, few, table
from launch.status.tail import read_object
from pomscale.base.console import format_age, format_count, format_duration
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.checkpoint_folder import complete_checkpoints, incomplete_checkpoints
from pomscale.runs.evaluation_log import Evaluation, read_evaluations
from pomscale.runs.history import read_history
from pomscale.runs.layout import CHECKPOINTS_FOLDER, LAUNCH_FILE, METRICS_FILE, STARTS_FILE, outcome_path
from pomscale.runs.ledger import goodput
from pomscale.runs.metric_names import METRICS, WALL_TIME, evaluation_of
from pomscale.runs.result_settings import as_text, flat

_MAX_STARTS, _MAX_FIGURES, _WIDTH = 12, 8, 120
_START_KEYS = {"incarnation", "started_unix_s", "start_samples", "num_ranks", "host"}
_METRICS = (
    "train/loss", "validation/loss", "train/grad_norm", "train/learning_rate", "speed/samples_per_s",
    "speed/step_time_s", "speed/data_wait_share", "speed/mfu", "memory/peak_gib", "faults/skipped_steps",
    "data/bad_samples",
)  # fmt: skip


def status(job_folder: Path) -> str:
    """Return the overview of a run. PomscaleError for a folder that cannot be read."""
    now_unix_s = time.time()
    facts = read_facts(job_folder)
    jobs, problem = ask_slurm([facts], now_unix_s)
    state = state_of(facts, jobs, now_unix_s)
    run = summary(facts, job_folder.resolve().name, state, now_unix_s)
    parts = [
        f"{run.name}: {run.state}" + (f" ({problem}; this state is read from the folder alone)" if problem else ""),
        _facts(facts, run, now_unix_s),
        _starts(facts, run),
        _metrics(facts),
        _evaluations(job_folder),
        _wall_time(job_folder),
        "next:\n" + "\n".join(f"  {command}" for command in next_commands(job_folder, run)),
    ]
    return "\n\n".join(filter(None, parts))


def _facts(facts: Facts, run: RunSummary, now_unix_s: float) -> str:
    job_folder = facts.job_folder
    lines = {"folder": str(job_folder)}
    if run.reason:
        lines["why"] = run.reason
    if run.log:
        lines["log"] = run.log
    if run.job_id is not None:
        lines["job"] = f"{run.job_id} of SLURM"
    if run.samples is not None:
        lines["progress"] = _progress(run)
    if run.last_row_unix_s is not None:
        lines["last row"] = format_age(run.last_row_unix_s, now_unix_s)
    complete = complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)
    with suppress(IndexError, FileNotFoundError):  # none yet, or retention has just deleted it
        age = format_age(complete[-1].stat().st_mtime, now_unix_s)
        lines["checkpoint"] = f"{complete[-1]}, {age}; {len(complete)} complete"
    if incomplete_checkpoints(job_folder / CHECKPOINTS_FOLDER):
        lines["incomplete"] = ", ".join(path.name for path in incomplete_checkpoints(job_folder / CHECKPOINTS_FOLDER))
    suspects = _suspects(job_folder)
    if suspects:
        lines["suspects"] = ", ".join(suspects)
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def _progress(run: RunSummary) -> str:
    samples = run.samples or 0
    if run.share is None:
        return f"{samples:,} samples"
    eta = f", done in {format_duration(run.eta_s)}" if run.eta_s is not None else ""
    return f"{samples:,} of {run.total_samples:,} samples ({run.share:.1%}){eta}"


def _suspects(job_folder: Path) -> list[str]:
    """Return the hosts that verdicts have suspected, newest first."""
    named = [host for start in reversed(read_starts(job_folder)) if start.verdict for host in start.verdict.suspects]
    return list(dict.fromkeys(named))


@dataclass(frozen=True)
class _Line:
    """A start of the job, of the run, or usually of both."""

    began_unix_s: float
    start: JobStart | None
    run_start: dict[str, Any] | None


def _starts(facts: Facts, run: RunSummary) -> str:
    lines = _lines(facts.job_folder)
    if not lines:
        return ""
    rows = [_row(facts.job_folder, line) for line in lines]
    for row in rows[:-1]:
        row[-1] = row[-1] or "no record of its end"
    if not rows[-1][-1]:
        rows[-1][-1] = run.state
        if rows[-1][-2] != NOTHING and run.samples is not None:
            rows[-1][-2] = f"{rows[-1][-2]}{format_count(run.samples)}"
    earlier = f"\n({len(lines) - _MAX_STARTS} starts before these)" if len(lines) > _MAX_STARTS else ""
    return table(["started", "job", "hosts", "ranks", "samples", "ended"], rows[-_MAX_STARTS:]) + earlier


def _lines(job_folder: Path) -> list[_Line]:
    """Return all starts, oldest first."""
    starts = read_starts(job_folder)
    written, _ = read_json_lines(job_folder / STARTS_FILE)
    run_starts = [row for row in written if row.keys() >= _START_KEYS]
    lines, taken = [], set()
    for number, start in enumerate(starts):
        until = starts[number + 1].record.newest_run_start if number + 1 < len(starts) else float("inf")
        # A run that was started by hand after the end of the job does not belong to it.
        ended_unix_s = start.verdict.decided_unix_s if start.verdict is not None else float("inf")
        own = [
            row
            for row in run_starts
            if start.record.newest_run_start < row["incarnation"] <= until and row["started_unix_s"] < ended_unix_s
        ]
        taken |= {row["incarnation"] for row in own}
        lines.append(_Line(start.record.started_unix_s, start, own[-1] if own else None))
    by_hand = [row for row in run_starts if row["incarnation"] not in taken]
    return sorted(
        [*lines, *[_Line(row["started_unix_s"], None, row) for row in by_hand]], key=lambda line: line.began_unix_s
    )


def _row(job_folder: Path, line: _Line) -> list[str]:
    """Return the cells of a start; the last one is empty if there is no record of its end."""
    start, run_start = line.start, line.run_start
    verdict = start.verdict if start is not None else None
    outcome: dict[str, Any] = {}
    if run_start is not None:
        outcome = read_object(outcome_path(job_folder, run_start["incarnation"], 0)) or {}
    ended = outcome.get("state", "")
    if outcome.get("reason"):
        ended = f"{ended}: {outcome['reason']}"
    if verdict is not None:
        ended = f"{verdict.action}: {verdict.reason}"
        if start is not None and start.refusal:
            ended += f"; SLURM refused it: {start.refusal}"
    until = outcome.get("samples", verdict.samples if verdict is not None else None)
    samples = NOTHING
    if run_start is not None:
        samples = f"{format_count(run_start['start_samples'])} - {'' if until is None else format_count(until)}"
    hosts = start.record.hosts if start is not None else [run_start["host"]] if run_start is not None else []
    return [
        time.strftime("%Y-%m-%d %H:%M", time.localtime(line.began_unix_s)),
        NOTHING if start is None else start.folder.name,
        few(hosts),
        NOTHING if run_start is None else str(run_start["num_ranks"]),
        samples,
        " ".join(ended.split()),
    ]


def _metrics(facts: Facts) -> str:
    """Return the last values. A metric that is not in the few rows that were read is left to `pomscale report`."""
    known = [(name, facts.latest(name)) for name in _METRICS]
    rows = [[name, f"{value:.5g}", METRICS[name]] for name, value in known if value is not None]
    return table(["metric", "last", ""], rows) if rows else ""


def _evaluations(job_folder: Path) -> str:
    """Return the newest figures of each evaluation, and all settings that they were measured with."""
    newest: dict[str, Evaluation] = {}
    has_metrics = (job_folder / METRICS_FILE).is_file()
    found = read_history(job_folder).evaluations if has_metrics else read_evaluations(job_folder)
    for evaluation in sorted(found, key=lambda one: one.samples):
        newest |= dict.fromkeys(evaluation.curves, evaluation)
    rows, settings = [], []
    for curve, evaluation in newest.items():
        figures = {name: value for name, value in evaluation.metrics.items() if evaluation_of(name) == curve}
        shown = [f"{name.rpartition('/')[2]} {value:.5g}" for name, value in figures.items()]
        rows.append([curve, format_count(evaluation.samples), few(shown, _MAX_FIGURES)])
        if evaluation.settings:
            words = ", ".join(f"{key} {as_text(value)}" for key, value in flat(evaluation.settings).items())
            settings.append(fill(f"{curve}: {words}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join([table(["evaluation", "samples", "newest figures"], rows), *settings]) if rows else ""


def _wall_time(job_folder: Path) -> str:
    times = goodput(job_folder)
    total = sum(times.seconds.values()) if times is not None else 0.0
    if times is None or not total:
        return ""
    rows = [
        [kind.replace("_", " "), f"{seconds / total:.1%}", format_duration(seconds), WALL_TIME[kind]]
        for kind, seconds in times.seconds.items()
        if seconds
    ]
    events = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(times.events.items()))
    head = ["wall time", "share", "time", ""]
    return table(head, rows, right={"share", "time"}) + (f"\nevents: {events}" if events else "")


def next_commands(job_folder: Path, run: RunSummary) -> list[str]:
    """Return the commands that are useful in the run's state."""
    launched = (job_folder / LAUNCH_FILE).is_file()
    folder = shlex.quote(str(job_folder))
    logs = [f"pomscale runs logs {folder}"] if launched else []
    again = f"pomscale runs resume {folder}" if launched else train_command(job_folder)
    if run.state in LIVE:
        follow = [f"pomscale runs logs {folder} --follow"] if launched else []
        return [f"pomscale watch {folder}", *follow, f"pomscale runs cancel {folder}"]
    if run.state == "finished" and run.num_starts:
        return [f"pomscale report {folder}", f"pomscale sample {folder} --num 8 --out grid.png"]
    return logs if run.state == "finished" else [*logs, again]
