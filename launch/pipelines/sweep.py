"""Runs of a recipe's sweep, each a job of its own. Launching again submits the runs that are left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.status.table import table
from launch.submission.checks import has_finished
from launch.submission.prepare import JobRequest, prepare_run, run_folder
from launch.submission.prepared import Prepared
from pomscale.base.errors import PomscaleError
from pomscale.config.sweep import SweepPoint


@dataclass(frozen=True)
class PlannedPoint:
    """One run of a sweep. prepared: the job to submit; None if nothing is to be done, for the reason in `state`."""

    point: SweepPoint
    job_folder: Path
    state: str
    prepared: Prepared | None = None


def plan_sweep(points: Sequence[SweepPoint], request: JobRequest) -> list[PlannedPoint]:
    """Check every run that has to be submitted. InputError, naming the first that is wrong."""
    folders = [run_folder(point.recipe, request.profile) for point in points]
    summaries = summarize({folder: folder.name for folder in folders if folder.is_dir()})
    states = {run.job_folder: run.state for run in summaries.runs}
    planned = []
    for point, folder in zip(points, folders, strict=True):
        if states.get(folder) in LIVE:
            planned.append(PlannedPoint(point, folder, states[folder]))
        elif has_finished(folder, point.recipe):
            planned.append(PlannedPoint(point, folder, "finished"))
        else:
            planned.append(PlannedPoint(point, folder, "new", prepare_run(point.recipe, request)))
    return planned


def submit_sweep(planned: Collection[PlannedPoint], *, new_code: bool) -> dict[Path, str]:
    """Submit the new runs. Return the job id by job folder.

    If one is refused, those before it stay: the same command submits the rest. On one machine the runs are executed one
    after another, however each of them ends.
    """
    jobs: dict[Path, str] = {}
    for one in planned:
        if one.prepared is None:
            continue
        prepared = one.prepared
        if prepared.profile.scheduler == "local" and jobs:
            prepared = prepared.waiting_for({str(list(jobs)[-1]): "any"})
        try:
            jobs[one.job_folder] = prepared.submit(new_code=new_code)
        except PomscaleError as error:
            if not jobs:
                raise
            rest = f"{len(jobs)} runs of this sweep were submitted before; the same command submits the others"
            raise type(error)(f"{one.job_folder.name}: {error}\n{rest}") from error
    return jobs


def sweep_table(planned: Sequence[PlannedPoint], jobs: Mapping[Path, str]) -> str:
    """Return a table with one line per run: its job and its values."""
    rows = [
        [jobs.get(one.job_folder, one.state), *map(str, one.point.values.values()), one.job_folder.name]
        for one in planned
    ]
    return table(["job", *planned[0].point.values, "run"], rows)
