"""Result of the newest submission of a job, on which jobs that wait for it and a second launch of a pipeline depend.

A job folder keeps the starts of all its submissions. An old failure says nothing about a job that has just been
submitted again and has not begun.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from launch.record.job import Condition, Submission, Verdict, read_submissions
from pomscale.runs.layout import ATTEMPTS_FOLDER, VERDICT_FILE
from pomscale.runs.starts import process_lives

# The time between the submission of a local job and its start. A process that began later only has the same number.
_STARTED_WITHIN_S = 120.0
_LOOK_EVERY_S = 1.0


def final_verdict(job_folder: Path) -> Verdict | None:
    """Return the verdict with which the newest submission ended; of an array, that on its first task to fail.

    None while any of its tasks waits or runs, and if there is no submission. On SLURM a job that was cancelled before
    it began has no verdict either: only the scheduler knows.
    """
    submission = next(iter(read_submissions(job_folder)[-1:]), None)
    if submission is None:
        return None
    lives = submission.scheduler == "slurm" or job_process_lives(submission)  # asked before its last verdict is read
    verdicts = _newest_verdicts(job_folder, submission)
    final = [verdict for verdict in verdicts if verdict.action in ("done", "fail")]
    if len(final) == _num_tasks(submission):
        return next((verdict for verdict in final if not is_success(verdict)), final[-1])
    if not lives:
        reason = verdicts[-1].reason if verdicts else "its process is gone, and has left no verdict"
        return Verdict("fail", reason, 1, time.time())
    return None


def is_success(verdict: Verdict) -> bool:
    """Whether a job that waits for this one may begin. More skipped items than the recipe tolerates are no success."""
    return verdict.action == "done" and verdict.exit_code == 0


def why_not_to_begin(wait_for: Mapping[str, Condition], patience_s: float) -> str:
    """Return why a job that SLURM has started must not begin; "" if all jobs that have to succeed before it have.

    SLURM starts a job `afterok` of one that has failed, too, once it has forgotten the failed one.

    Args:
        wait_for: Condition by job folder of the jobs before this one.
        patience_s: Time for which a record of success is waited for: a shared file system shows new files late.
    """
    deadline_s = time.monotonic() + patience_s
    for job_folder in (Path(folder) for folder, condition in wait_for.items() if condition == "ok"):
        while (verdict := final_verdict(job_folder)) is None and time.monotonic() < deadline_s:
            time.sleep(_LOOK_EVERY_S)
        if verdict is None:
            return f"not begun, since the job before it ({job_folder}) has left no record of its success"
        if not is_success(verdict):
            return not_begun_after(job_folder, verdict)
    return ""


def not_begun_after(job_folder: Path | str, verdict: Verdict) -> str:
    """Return the reason of a job that does not begin because the job before it did not succeed."""
    return f"not begun, since the job before it ({job_folder}) did not succeed: {verdict.reason}"


def job_process_lives(submission: Submission) -> bool:
    """Whether the process of a local or debug job is alive on this machine."""
    return process_lives(int(submission.job_id), began_before_unix_s=submission.submitted_unix_s + _STARTED_WITHIN_S)


def _num_tasks(submission: Submission) -> int:
    """Return 1 for a local array, which is one job whose ranks are its tasks."""
    return submission.num_tasks if submission.scheduler == "slurm" else 1


def _newest_verdicts(job_folder: Path, submission: Submission) -> list[Verdict]:
    """Return the verdicts on the newest start of each task, as far as there are any, by task."""
    newest: dict[str, tuple[int, Path]] = {}
    for folder in (job_folder / ATTEMPTS_FOLDER).glob(f"{submission.job_id}[-_]*"):
        task, _, restart = folder.name.rpartition("-")
        if task == submission.job_id or task.startswith(f"{submission.job_id}_"):
            newest[task] = max(newest.get(task, (-1, folder)), (int(restart), folder))
    found = []
    for _, (_, folder) in sorted(newest.items()):
        if (folder / VERDICT_FILE).is_file():
            verdict = Verdict.read(folder / VERDICT_FILE).seen_from(job_folder)
            # Process numbers repeat, so this may be the verdict on an earlier job with the same number.
            is_its_own = submission.scheduler == "slurm" or verdict.decided_unix_s >= submission.submitted_unix_s
            if is_its_own:
                found.append(verdict)
    return found
