"""History of a run, read from metrics.jsonl and evaluations.jsonl, without what kills and rollbacks made void."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.jsonl import read_json_lines
from pomscale.runs.evaluation_log import Evaluation, read_evaluations
from pomscale.runs.layout import METRICS_FILE, STARTS_FILE

_NON_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class History:
    """Rows that a run logged, and evaluations of its checkpoints.

    Attributes:
        series: metric -> (samples, values), samples strictly increasing.
        starts: objects of incarnations.jsonl, one per start of the run.
        resumed_at: samples from which the run continued, once per start that has logged but the first.
        num_unreadable: lines of metrics.jsonl that a kill has cut off, and that are left out.
        last_time_unix_s: when training wrote its last row; None without rows.
        evaluations: those that count, oldest first; their figures are in `series` too.
    """

    series: dict[str, tuple[list[int], list[float]]]
    starts: list[dict[str, Any]]
    resumed_at: list[int]
    num_unreadable: int
    last_time_unix_s: float | None
    evaluations: list[Evaluation]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings of the newest result of each evaluation, by NAME or NAME@KEY; empty if none were recorded."""
        return {curve: evaluation.settings for evaluation in self.evaluations for curve in evaluation.curves}


def read_history(run_folder: Path) -> History:
    """Read RUN/metrics.jsonl. Raises InputError when there is none.

    A resumed run goes back to its last checkpoint and repeats the steps after it. So, when a new start begins to log,
    every earlier row beyond the samples it began from (incarnations.jsonl) is dropped, including those it has not
    reached again yet. Rows of an older start that come after a newer one has logged are of a process that outlived its
    replacement; they are dropped too. A row with fewer samples than the one before it is the sign of a rollback: rows
    beyond it are dropped as well. Of what is left, the last value of a metric at the same samples counts.

    An evaluation is dropped by the same rule, as if it were a row that training wrote when the evaluation was recorded:
    if the run has gone back beyond its samples since then. So an evaluation that is recorded after the run has gone
    back counts, until the checkpoint that replaces its checkpoint is evaluated.
    """
    path = run_folder / METRICS_FILE
    if not path.exists():
        raise InputError(f"no metrics in {run_folder}: {METRICS_FILE} is missing. Is it a run folder, has it started?")
    lines, _ = read_json_lines(run_folder / STARTS_FILE)
    # A start whose line says neither is as one that was not recorded.
    starts = [line for line in lines if {"incarnation", "start_samples"} <= line.keys()]
    start_samples = {start["incarnation"]: start["start_samples"] for start in starts}
    written, num_unreadable = read_json_lines(path)
    rows, resumed_at, went_back = _what_counts(written, start_samples)
    evaluations = [
        evaluation
        for evaluation in read_evaluations(run_folder)
        if not any(evaluation.time_unix_s < then and evaluation.samples > samples for then, samples in went_back)
    ]

    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("samples", "time_unix_s", "incarnation"):
                continue
            if isinstance(value, int | float) or value in _NON_FINITE:
                values.setdefault(name, {})[row["samples"]] = float(value)
    for evaluation in evaluations:
        for name, figure in evaluation.metrics.items():
            values.setdefault(name, {})[evaluation.samples] = figure
    series = {name: (sorted(points), [points[at] for at in sorted(points)]) for name, points in values.items()}
    last_time_unix_s = rows[-1]["time_unix_s"] if rows else None
    return History(series, starts, resumed_at, num_unreadable, last_time_unix_s, evaluations)


def samples_seen(run_folder: Path) -> int:
    """Return the samples of the last whole row of RUN/metrics.jsonl; 0 without rows."""
    path = run_folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return json.loads(lines[-1])["samples"] if lines else 0


def _what_counts(
    written: list[dict[str, Any]], start_samples: dict[int, int]
) -> tuple[list[dict[str, Any]], list[int], list[tuple[float, int]]]:
    """Return the rows that count, `resumed_at`, and (time, samples gone back to) for each time the run went back."""
    rows: list[dict[str, Any]] = []
    resumed_at: list[int] = []
    went_back: list[tuple[float, int]] = []
    for row in written:
        newest = rows[-1]["incarnation"] if rows else row["incarnation"]
        if row["incarnation"] < newest:
            continue
        if row["incarnation"] > newest:
            # A start that was not recorded began before its first row.
            start = start_samples.get(row["incarnation"], row["samples"] - 1)
            resumed_at = [*(samples for samples in resumed_at if samples <= start), start]
        else:
            start = row["samples"]
        if row["incarnation"] > newest or (rows and start < rows[-1]["samples"]):
            rows = [earlier for earlier in rows if earlier["samples"] <= start]
            went_back.append((row["time_unix_s"], start))
        rows.append(row)
    return rows, resumed_at, went_back
