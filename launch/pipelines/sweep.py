"""All runs of a recipe's sweep, each a job of its own. Launching again submits those that are left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.submission.checks import has_finished
from launch.submission.prepare import How, Prepared, prepare_run, run_folder
from pomscale.base.errors import PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.sweep import SweepPoint


@dataclass(frozen=True)
class PlannedPoint:
    """One run, and what is to be done about it. prepared: None where nothing is, as `state` says why."""

    point: SweepPoint
    job_folder: Path
    state: str
    prepared: Prepared | None = None


def plan_sweep(
    points: Sequence[SweepPoint], profile: ClusterProfile, cluster_name: str, how: How
) -> list[PlannedPoint]:
    """Every run that has to be submitted is checked. InputError, naming the first that is wrong."""
    job_folders = [run_folder(point.recipe, profile) for point in points]
    states = {
        run.job_folder: run.state
        for run in summarize({job_folder: job_folder.name for job_folder in job_folders if job_folder.is_dir()}).runs
    }
    planned = []
    for point, job_folder in zip(points, job_folders, strict=True):
        if states.get(job_folder) in LIVE:
            planned.append(PlannedPoint(point, job_folder, states[job_folder]))
        elif has_finished(job_folder, point.recipe):
            planned.append(PlannedPoint(point, job_folder, "finished"))
        else:
            prepared = prepare_run(point.recipe, profile, cluster_name, **how)
            planned.append(PlannedPoint(point, job_folder, "new", prepared))
    return planned


def submit_sweep(planned: Collection[PlannedPoint], *, new_code: bool) -> dict[Path, str]:
    """Home -> job id of the new ones. If one is refused, those before it stay: the same command submits the rest.

    On one machine they run one after another, whatever becomes of each.
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
            told = f"{len(jobs)} runs of this sweep were submitted before; the same command submits the others"
            raise type(error)(f"{one.job_folder.name}: {error}\n{told}") from error
    return jobs


def table(planned: Sequence[PlannedPoint], jobs: Mapping[Path, str]) -> str:
    """One line per run: its values, and its job."""
    keys = list(planned[0].point.values)
    rows = [["job", *keys, "run"]]
    for one in planned:
        values = [str(value) for value in one.point.values.values()]
        rows.append([jobs.get(one.job_folder, one.state), *values, one.job_folder.name])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
