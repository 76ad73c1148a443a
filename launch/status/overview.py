"""`pomscale runs status`: everything about one run on one screen."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.record.job import LAUNCH_FILE, Attempt, attempts
from launch.status.facts import Facts, read_facts
from launch.status.runs import RunSummary, ask_slurm, summary
from launch.status.state import LIVE, state_of
from launch.status.table import NOTHING, few, table
from launch.status.tail import read_object
from pomscale.base.console import format_age, format_count, format_duration
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.checkpoint_folder import complete_checkpoints, incomplete_checkpoints
from pomscale.runs.layout import CHECKPOINTS_FOLDER, STARTS_FILE, outcome_path
from pomscale.runs.ledger import goodput
from pomscale.runs.metric_names import METRICS, WALL_TIME

_MAX_STARTS = 12
_START_KEYS = {"incarnation", "started_unix_s", "start_samples", "num_ranks", "host"}
_METRICS = (
    "train/loss", "validation/loss", "train/grad_norm", "train/learning_rate", "speed/samples_per_s",
    "speed/step_time_s", "speed/data_wait_share", "speed/mfu", "memory/peak_gib", "faults/skipped_steps",
    "data/bad_samples",
)  # fmt: skip


def status(home: Path) -> str:
    """For people. PomscaleError for a folder that cannot be read."""
    now_unix_s = time.time()
    facts = read_facts(home)
    jobs, problem = ask_slurm([facts], now_unix_s)
    state = state_of(facts, jobs, now_unix_s)
    run = summary(facts, home.resolve().name, state, now_unix_s)
    parts = [
        f"{run.name}: {run.state}" + (f" ({problem}; this is what the folder tells)" if problem else ""),
        _facts(facts, run, now_unix_s),
        _starts(facts, run),
        _metrics(facts),
        _wall_time(home),
        "next:\n" + "\n".join(f"  {command}" for command in next_commands(home, run)),
    ]
    return "\n\n".join(filter(None, parts))


def _facts(facts: Facts, run: RunSummary, now_unix_s: float) -> str:
    home = facts.home
    lines = {"folder": str(home)}
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
    complete = complete_checkpoints(home / CHECKPOINTS_FOLDER)
    with suppress(IndexError, FileNotFoundError):  # none yet; or retention has just taken it
        age = format_age(complete[-1].stat().st_mtime, now_unix_s)
        lines["checkpoint"] = f"{complete[-1]}, {age}; {len(complete)} complete"
    if incomplete_checkpoints(home / CHECKPOINTS_FOLDER):
        lines["incomplete"] = ", ".join(path.name for path in incomplete_checkpoints(home / CHECKPOINTS_FOLDER))
    suspects = _suspects(home)
    if suspects:
        lines["suspects"] = ", ".join(suspects)
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def _progress(run: RunSummary) -> str:
    samples = run.samples or 0
    if run.share is None:
        return f"{samples:,} samples"
    eta = f", done in {format_duration(run.eta_s)}" if run.eta_s is not None else ""
    return f"{samples:,} of {run.total_samples:,} samples ({run.share:.1%}){eta}"


def _suspects(home: Path) -> list[str]:
    """Hosts that verdicts have named, the newest first."""
    named = [host for attempt in reversed(attempts(home)) if attempt.verdict for host in attempt.verdict.suspects]
    return list(dict.fromkeys(named))


@dataclass(frozen=True)
class _Line:
    """A start: of a job, of the run, or, mostly, of both."""

    began_unix_s: float
    attempt: Attempt | None
    incarnation: dict[str, Any] | None


def _starts(facts: Facts, run: RunSummary) -> str:
    lines = _lines(facts.home)
    if not lines:
        return ""
    rows = [_row(facts.home, line) for line in lines]
    for row in rows[:-1]:
        row[-1] = row[-1] or "without a word"
    if not rows[-1][-1]:
        rows[-1][-1] = run.state
        if rows[-1][-2] != NOTHING and run.samples is not None:
            rows[-1][-2] = f"{rows[-1][-2]}{format_count(run.samples)}"
    earlier = f"\n({len(lines) - _MAX_STARTS} starts before these)" if len(lines) > _MAX_STARTS else ""
    return table(["started", "job", "hosts", "ranks", "samples", "ended"], rows[-_MAX_STARTS:]) + earlier


def _lines(home: Path) -> list[_Line]:
    """Oldest first."""
    starts = attempts(home)
    written, _ = read_json_lines(home / STARTS_FILE)
    incarnations = [row for row in written if row.keys() >= _START_KEYS]
    lines, taken = [], set()
    for place, attempt in enumerate(starts):
        until = starts[place + 1].start.newest_generation if place + 1 < len(starts) else float("inf")
        # What was started by hand, after the job had ended, is not its own.
        ended_unix_s = attempt.verdict.decided_unix_s if attempt.verdict is not None else float("inf")
        own = [
            row
            for row in incarnations
            if attempt.start.newest_generation < row["incarnation"] <= until and row["started_unix_s"] < ended_unix_s
        ]
        taken |= {row["incarnation"] for row in own}
        lines.append(_Line(attempt.start.started_unix_s, attempt, own[-1] if own else None))
    by_hand = [row for row in incarnations if row["incarnation"] not in taken]
    return sorted(
        [*lines, *[_Line(row["started_unix_s"], None, row) for row in by_hand]], key=lambda line: line.began_unix_s
    )


def _row(home: Path, line: _Line) -> list[str]:
    """The last cell is empty where nobody has told how it ended."""
    attempt, incarnation = line.attempt, line.incarnation
    verdict = attempt.verdict if attempt is not None else None
    outcome: dict[str, Any] = {}
    if incarnation is not None:
        outcome = read_object(outcome_path(home, incarnation["incarnation"], 0)) or {}
    ended = outcome.get("state", "")
    if outcome.get("reason"):
        ended = f"{ended}: {outcome['reason']}"
    if verdict is not None:
        ended = f"{verdict.action}: {verdict.reason}"
    until = outcome.get("samples", verdict.samples if verdict is not None else None)
    samples = NOTHING
    if incarnation is not None:
        samples = f"{format_count(incarnation['start_samples'])} - {'' if until is None else format_count(until)}"
    hosts = attempt.start.hosts if attempt is not None else [incarnation["host"]] if incarnation is not None else []
    return [
        time.strftime("%Y-%m-%d %H:%M", time.localtime(line.began_unix_s)),
        NOTHING if attempt is None else attempt.folder.name,
        few(hosts),
        NOTHING if incarnation is None else str(incarnation["num_ranks"]),
        samples,
        " ".join(ended.split()),
    ]


def _metrics(facts: Facts) -> str:
    """The last values; what is rarer than the rows that were read is left to the report."""
    known = [(name, facts.latest(name)) for name in _METRICS]
    rows = [[name, f"{value:.5g}", METRICS[name]] for name, value in known if value is not None]
    return table(["metric", "last", ""], rows) if rows else ""


def _wall_time(home: Path) -> str:
    times = goodput(home)
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


def next_commands(home: Path, run: RunSummary) -> list[str]:
    """What one may want to type now."""
    launched = (home / LAUNCH_FILE).is_file()
    logs = [f"pomscale runs logs {home}"] if launched else []
    again = f"pomscale runs resume {home}" if launched else f"pomscale train {home / 'recipe.yaml'}"
    if run.state in LIVE:
        follow = f"pomscale runs logs {home} --follow"
        return [f"pomscale watch {home}", *([follow] if launched else []), f"pomscale runs cancel {home}"]
    if run.state == "finished":
        return [f"pomscale report {home}", f"pomscale sample {home} --num 8 --out grid.png"] if run.num_starts else logs
    return [*logs, again]
