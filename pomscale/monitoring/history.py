"""Reads metrics.jsonl back as the one story of a run, whatever was killed and done again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.errors import InputError
from pomscale.monitoring.sinks import METRICS_FILE

_NON_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class History:
    """What a run logged.

    series: metric -> (samples, values), samples strictly increasing.
    resumed_at: samples of the last row that stands before each resume; the checkpoint lies there or, if it was
        taken between two rows, less than one row later.
    num_unreadable: lines cut off by a kill, left out.
    last_time_unix_s: when the last row was written; None without rows.
    """

    series: dict[str, tuple[list[int], list[float]]]
    resumed_at: list[int]
    num_unreadable: int
    last_time_unix_s: float | None


def read_history(run_folder: Path) -> History:
    """Read RUN/metrics.jsonl. Raises InputError when there is none.

    A resumed run goes back to its last checkpoint and does again what its predecessor did after it. So the first
    row of an incarnation replaces every earlier row at the same or a larger number of samples, including those it
    has not reached again yet: they belong to a future that was given up. Rows of an older incarnation that come
    after a newer one has written are a process that outlived its replacement; they are left out. Within one
    incarnation the last value of a metric at the same samples wins.
    """
    path = run_folder / METRICS_FILE
    if not path.exists():
        raise InputError(f"no metrics in {run_folder}: {METRICS_FILE} is missing. Is it a run folder, has it started?")
    rows: list[dict[str, Any]] = []
    resumed_at: list[int] = []
    num_unreadable = 0
    newest: int | None = None
    with path.open("rb") as lines:
        for line in lines:
            row = _parse(line)
            if row is None:
                num_unreadable += bool(line.strip())
                continue
            if newest is not None and row["incarnation"] < newest:
                continue
            if newest is not None and row["incarnation"] > newest:
                rows = [earlier for earlier in rows if earlier["samples"] < row["samples"]]
                resumed_at = [samples for samples in resumed_at if samples < row["samples"]]
                resumed_at.append(max((earlier["samples"] for earlier in rows), default=0))
            newest = row["incarnation"]
            rows.append(row)

    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("samples", "time_unix_s", "incarnation"):
                continue
            if isinstance(value, int | float) or value in _NON_FINITE:
                values.setdefault(name, {})[row["samples"]] = float(value)
    series = {name: (sorted(points), [points[at] for at in sorted(points)]) for name, points in values.items()}
    return History(series, resumed_at, num_unreadable, rows[-1]["time_unix_s"] if rows else None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # cut-off JSON, or bytes that are no text
        return None
    # A cut-off object is never valid JSON, so whatever parses was written whole by JsonlSink.
    return row if isinstance(row, dict) else None
