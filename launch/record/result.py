"""How the newest submission of a job ended: what waits for it, and a second launch of a pipeline, go by that.

A home keeps the starts of all its submissions. An old failure says nothing about a job that has just been submitted
again and has not begun.
"""

from __future__ import annotations

import time
from pathlib import Path

from launch.record.job import STARTS, Submission, Verdict, submissions
from pomscale.runs.starts import process_lives

_STARTED_WITHIN_S = 120.0  # a local job, after its submission; a process that began later has only got the same number


def ended(job_folder: Path) -> Verdict | None:
    """The verdict with which the newest submission ended: of an array that on its first task to fail.

    None while any task of it waits or runs, and where there is no submission. On SLURM a job that was cancelled before
    it began has none either: the scheduler knows.
    """
    submission = next(iter(submissions(job_folder)[-1:]), None)
    if submission is None:
        return None
    lives = submission.scheduler == "slurm" or process_of_job_lives(submission)  # before its last word is read
    verdicts = _verdicts(job_folder, submission)
    final = [verdict for verdict in verdicts if verdict.action in ("done", "fail")]
    if len(final) == _num_tasks(submission):
        return next((verdict for verdict in final if not is_success(verdict)), final[-1])
    if not lives:
        reason = verdicts[-1].reason if verdicts else "its process is gone, and has left no verdict"
        return Verdict("fail", reason, 1, time.time())
    return None


def is_success(verdict: Verdict) -> bool:
    """Whether what waits for it may begin: skipped items beyond what a recipe puts up with are no success."""
    return verdict.action == "done" and verdict.exit_code == 0


def process_of_job_lives(submission: Submission) -> bool:
    """Of a job that is not SLURM's, on this machine."""
    return process_lives(int(submission.job_id), began_before_unix_s=submission.submitted_unix_s + _STARTED_WITHIN_S)


def _num_tasks(submission: Submission) -> int:
    """A local array is one job, whose ranks are its tasks."""
    return submission.num_tasks if submission.scheduler == "slurm" else 1


def _verdicts(job_folder: Path, submission: Submission) -> list[Verdict]:
    """On the newest start of each task, as far as there are any, by task."""
    newest: dict[str, tuple[int, Path]] = {}
    for folder in (job_folder / STARTS).glob(f"{submission.job_id}[-_]*"):
        task, _, restart = folder.name.rpartition("-")
        if task == submission.job_id or task.startswith(f"{submission.job_id}_"):
            newest[task] = max(newest.get(task, (-1, folder)), (int(restart), folder))
    found = []
    for _, (_, folder) in sorted(newest.items()):
        if (folder / "verdict.json").is_file():
            verdict = Verdict.read(folder / "verdict.json")
            # Numbers of processes repeat: this may be another one's.
            is_its_own = submission.scheduler == "slurm" or verdict.decided_unix_s >= submission.submitted_unix_s
            if is_its_own:
                found.append(verdict)
    return found
