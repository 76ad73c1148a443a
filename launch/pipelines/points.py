"""Commands that share nothing, each as a job of its own: the points of a sweep over one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.submission.prepare import JobRequest, prepare_commands
from pomscale.base.errors import PomscaleError


def submit_points(points: Mapping[Path, Sequence[str]], request: JobRequest) -> dict[Path, str]:
    """Submit each command that has no live job in its job folder. Return the job id, or the state, by job folder.

    A job is one process, with one GPU if the nodes have any. On one machine jobs run one after another, however each of
    them ends. In a dry run all is checked, and nothing submitted.

    Args:
        points: The words after `pomscale`, by job folder.
        request: Where the jobs shall run.

    Raises:
        InputError: If a job would be refused, before any is submitted.
        PomscaleError: If SLURM does not answer; the same call submits those that are left.
    """
    one_process = replace(request, gpus_per_node=min(request.profile.gpus_per_node, 1), ranks_per_node=1)
    states = {run.job_folder: run.state for run in summarize({folder: folder.name for folder in points}).runs}
    states = {folder: state for folder, state in states.items() if state in LIVE}
    prepared = {
        folder: prepare_commands(f"{folder.parent.name}-{folder.name}", folder, [list(words)], one_process)
        for folder, words in points.items()
        if folder not in states
    }
    if request.dry_run:
        return states | dict.fromkeys(prepared, "would be submitted")
    jobs: dict[Path, str] = {}
    for folder, job in prepared.items():
        waits = request.profile.scheduler == "local" and jobs
        try:
            jobs[folder] = f"job {(job.waiting_for({str(list(jobs)[-1]): 'any'}) if waits else job).submit()}"
        except PomscaleError as error:
            raise type(error)(f"{folder.name}: {error}; {len(jobs)} points were submitted before") from error
    return states | jobs
