"""Report of run folders as one picture and one self-contained HTML page (`pomscale report`).

Only files of the run folders are read, so it works without a network, on a run that is still running, and on one that
was killed. The page loads nothing: it contains its pictures and clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, make_folder, write_text
from pomscale.monitoring.report import compare, run
from pomscale.monitoring.report.run import Run
from pomscale.runs.history import read_history
from pomscale.runs.layout import REPORT_NAME
from pomscale.runs.ledger import goodput


@dataclass(frozen=True)
class ReportPaths:
    """Paths of a report, and the runs that were left out since they have logged nothing yet."""

    png: Path
    html: Path
    left_out: tuple[Path, ...] = ()


def write_report(run_folders: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Write report.png and report.html into the folder `out`.

    By default `out` is the run folder. The report of several runs is comparison.png and comparison.html, by default in
    the folder that holds the first one. Raises InputError if no run has logged anything yet, or one is named twice.
    """
    runs, problems = [], {}
    for folder in run_folders:
        try:
            runs.append(_read_run(folder))
        except InputError as problem:
            problems[folder] = problem
    if not runs:
        raise next(iter(problems.values()))
    if len({run.folder for run in runs}) < len(runs):
        raise InputError("report: the same run is named twice")
    if len(runs) == 1:
        folder, name = out or runs[0].folder, REPORT_NAME
        png, page = run.overview(runs[0]), run.page(runs[0])
    else:
        folder, name = out or runs[0].folder.parent, "comparison"
        png, page = compare.overview(runs), compare.page(runs)
    make_folder(folder)
    paths = ReportPaths(folder / f"{name}.png", folder / f"{name}.html", tuple(problems))
    with atomic_write(paths.png) as stream:
        stream.write(png)
    write_text(paths.html, page)
    return paths


def _read_run(folder: Path) -> Run:
    history = read_history(folder)
    if not history.series:
        raise InputError(f"no metrics in {folder}: nothing was logged yet")
    return Run(folder.resolve(), history, goodput(folder))
