"""`pomscale runs`: a table with a line per run. The tables of other commands are laid out here, too."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from launch.status.runs import RUNS, RunSummary, Summaries, find_runs, summarize
from launch.status.state import WORDS
from pomscale.base.console import format_age, format_count, format_duration
from pomscale.base.errors import InputError
from pomscale.runs.metric_names import OTHER_SETTINGS, QUALITY, evaluation_of

_HEAD = ("name", "state", "starts", "samples", "share", "loss", "images/s", "goodput", "ETA", "last row")
_NUMBERS = frozenset(_HEAD[2:])
NOTHING = "-"


def list_runs(folders: Sequence[Path], states: Collection[str] = ()) -> Summaries:
    """Summarize the runs below folders. InputError for an unknown state or folder.

    Args:
        folders: Default: the folder runs/.
        states: If given, only runs in one of these states.
    """
    unknown = sorted(set(states) - set(WORDS))
    if unknown:
        raise InputError(f"--state: {', '.join(unknown)}: no such state; there are {', '.join(WORDS)}")
    job_folders: dict[Path, str] = {}
    for folder in folders or [RUNS]:
        job_folders |= find_runs(folder)
    found = summarize(job_folders)
    return Summaries([run for run in found.runs if not states or run.state in states], found.problem)


def as_table(summaries: Summaries) -> str:
    """Return the table for the terminal."""
    if not summaries.runs:
        return "no runs"
    now_unix_s = time.time()
    rows = [_cells(run, now_unix_s) for run in summaries.runs]
    if not any(run.quality for run in summaries.runs):
        return table(_HEAD, rows, right=_NUMBERS)
    rows = [[*row, _quality(run)] for row, run in zip(rows, summaries.runs, strict=True)]
    return table([*_HEAD, "quality"], rows, right=_NUMBERS)


def as_json(summaries: Summaries) -> str:
    """Return a JSON list of objects. Numbers that JSON lacks are the strings "nan", "inf" and "-inf"."""
    return json.dumps([_plain(run) for run in summaries.runs], indent=1, allow_nan=False)


def _plain(run: RunSummary) -> dict[str, object]:
    values = asdict(run) | {"share": run.share}
    folder = values.pop("job_folder").resolve()
    values["quality"] = {name: _finite(value) for name, value in run.quality.items()}
    return {"home": str(folder)} | {name: _finite(value) for name, value in values.items()}


def _finite(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cells(run: RunSummary, now_unix_s: float) -> list[str]:
    return [
        run.name,
        run.state,
        str(run.num_starts),
        NOTHING if run.samples is None else format_count(run.samples),
        NOTHING if run.share is None else f"{run.share:.0%}",
        NOTHING if run.loss is None else f"{run.loss:.4f}",
        NOTHING if run.samples_per_s is None else f"{run.samples_per_s:.4g}",
        NOTHING if run.goodput is None else f"{run.goodput:.0%}",
        NOTHING if run.eta_s is None else format_duration(run.eta_s),
        NOTHING if run.last_row_unix_s is None else format_age(run.last_row_unix_s, now_unix_s),
    ]


def _quality(run: RunSummary) -> str:
    """Return the foremost figure of the run's generated samples; a curve NAME@KEY is named, since settings differ."""
    for figure in QUALITY:
        for name, value in run.quality.items():
            if name.rpartition("/")[2] == figure:
                curve = evaluation_of(name)
                return f"{figure} {value:.4g}" + (f" ({curve})" if OTHER_SETTINGS in curve else "")
    return NOTHING


def few(words: Sequence[str], most: int = 4) -> str:
    """Return the first words, and the number of the others: "a, b and 3 more"."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> str:
    """Lay out a table with columns as wide as needed. right: the columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shell_path(folder: Path) -> str:
    """Return a folder as one may type it in the current folder, quoted for a shell."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
