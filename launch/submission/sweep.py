"""All runs of a recipe's sweep, each a job of its own. Launching again submits those that are left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.submission.checks import has_finished
from launch.submission.prepare import How, Prepared, prepare_run, run_home
from pomscale.base.errors import PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.sweep import SweepPoint


@dataclass(frozen=True)
class PlannedPoint:
    """One run, and what is to be done about it. prepared: None where nothing is, as `state` says why."""

    point: SweepPoint
    home: Path
    state: str
    prepared: Prepared | None = None


def plan_sweep(
    points: Sequence[SweepPoint], profile: ClusterProfile, cluster_name: str, how: How
) -> list[PlannedPoint]:
    """Every run that has to be submitted is checked. InputError, naming the first that is wrong."""
    homes = [run_home(point.recipe, profile) for point in points]
    states = {run.home: run.state for run in summarize({home: home.name for home in homes if home.is_dir()}).runs}
    planned = []
    for point, home in zip(points, homes, strict=True):
        if states.get(home) in LIVE:
            planned.append(PlannedPoint(point, home, states[home]))
        elif has_finished(home, point.recipe):
            planned.append(PlannedPoint(point, home, "finished"))
        else:
            prepared = prepare_run(point.recipe, profile, cluster_name, **how)
            planned.append(PlannedPoint(point, home, "new", prepared))
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
            jobs[one.home] = prepared.submit(new_code=new_code)
        except PomscaleError as error:
            if not jobs:
                raise
            told = f"{len(jobs)} runs of this sweep were submitted before; the same command submits the others"
            raise type(error)(f"{one.home.name}: {error}\n{told}") from error
    return jobs


def table(planned: Sequence[PlannedPoint], jobs: Mapping[Path, str]) -> str:
    """One line per run: its values, and its job."""
    keys = list(planned[0].point.values)
    rows = [["job", *keys, "run"]]
    for one in planned:
        values = [str(value) for value in one.point.values.values()]
        rows.append([jobs.get(one.home, one.state), *values, one.home.name])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
