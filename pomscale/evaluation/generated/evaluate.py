"""Evaluate pictures or clips: processes measure parts, and the one that finds all of them done computes metrics.

A part's numbers depend on the plan alone: its pictures, its batches and the order of its sums are fixed. Parts are put
together in their order. So the figures are equal to the last digit on any number of ranks or tasks, and after a kill,
where every process has the same number of threads and the same kind of device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.claims import Claims
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.base.shared_progress import SharedProgress
from pomscale.base.task_index import TaskIndex
from pomscale.evaluation.generated.evaluation import Evaluation, Job
from pomscale.evaluation.generated.finishing import check_skipped, finish
from pomscale.evaluation.generated.pictures_out import check_no_tars
from pomscale.evaluation.generated.work_folder import PLAN, RESULT, PartFiles, adopt, drop_parts, make_parts_folder


@dataclass(frozen=True)
class Outcome:
    """The outcome of one process.

    Attributes:
        work: The shared folder.
        result: The result as JSON; None while other processes are at work.
        num_parts: Parts of all sides.
        num_made: Parts that this process measured.
        num_elsewhere: Parts that are not done yet.
        shows: Whether this process is the one of its tasks that shows the result.
    """

    work: Path
    result: dict[str, Any] | None
    num_parts: int
    num_made: int
    num_elsewhere: int
    shows: bool = True


def evaluate(
    evaluation: Evaluation,
    task: TaskIndex = TaskIndex(),  # noqa: B008  frozen
    publish: Callable[[dict[str, Any]], None] = lambda result: None,
    *,
    progress: bool = True,
) -> Outcome:
    """Measure the parts that are missing; the process that finds all of them done computes the result.

    Args:
        evaluation: What is measured.
        task: Index of this process among those that share the work folder.
        publish: Called with the result by the process that computes it, before it is marked as done, and by those
            that find it done: it must not matter how often.
        progress: Show progress on standard error.

    Raises:
        InputError: More pictures cannot be read than are allowed, the work folder is another evaluation's, or a file
            that it wrote is gone.
        PomscaleError: A file cannot be written, or storage fails.
    """
    work, jobs = evaluation.work(), evaluation.jobs()
    make_folder(work)
    with Claims(work, several=task.count > 1) as claims:
        with claims.listing():
            tars = evaluation.request.outputs.tars
            if tars is not None and not (work / PLAN).exists():
                check_no_tars(tars)
                make_folder(tars)
            adopt(work, evaluation.plan())
        # One of several ranks shows a result that was there; else the one that computes it does.
        shows = task.count == 1 or (task.index == 0 and (work / RESULT).exists())
        num_made = 0 if (work / RESULT).exists() else _make_parts(evaluation, claims, task, progress)
        files = {side: PartFiles(work, side) for side in evaluation.measurements}
        with claims.finishing():
            if (work / RESULT).exists():
                result = _read_result(evaluation, work)
                publish(result)
                return Outcome(work, result, len(jobs), num_made, 0, shows)
            left = [job for job in jobs if not evaluation.measurements[job.side].is_done(files[job.side], job.part)]
            if left:
                return Outcome(work, None, len(jobs), num_made, len(left))
            result = finish(evaluation, work, files)
            publish(result)
            write_text(work / RESULT, json.dumps(result, indent=1))
            drop_parts(work)
    return Outcome(work, result, len(jobs), num_made, 0)


def _read_result(evaluation: Evaluation, work: Path) -> dict[str, Any]:
    """Return a result that is there. InputError if it would not be that of this request.

    What the plan does not say may have changed: how many pictures may be left out, and the files that were written.
    """
    try:
        result: dict[str, Any] = json.loads((work / RESULT).read_text(encoding="utf-8"))
        num_failed = sum(side["failures"] for side in result["pictures"].values())
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{work / RESULT}: is damaged ({error!r}); delete {work} to measure again") from error
    check_skipped(num_failed, evaluation, work)
    outputs = evaluation.request.outputs
    for path in filter(None, (outputs.npz, outputs.statistics, outputs.tars)):
        if not path.exists():
            raise InputError(f"{path}: is gone, and was written when this was measured; delete {work} to measure again")
    return result


def _make_parts(evaluation: Evaluation, claims: Claims, task: TaskIndex, shows: bool) -> int:
    """Measure the parts that nobody else has claimed, until there is none; return their number."""
    jobs, work = evaluation.jobs(), evaluation.work()
    files = {side: PartFiles(work, side) for side in evaluation.measurements}
    num_made = 0
    make_parts_folder(work)

    def is_done(job: Job) -> bool:
        return evaluation.measurements[job.side].is_done(files[job.side], job.part)

    def num_recorded() -> int:
        return sum(job.num_pictures for job in jobs if is_done(job))

    total = sum(job.num_pictures for job in jobs)
    with SharedProgress(evaluation.kind, total, num_recorded, task.count, enabled=shows) as progress:
        for number in task.order(len(jobs)):
            job = jobs[number]
            if not claims.claim(number):
                continue
            try:
                if is_done(job):
                    continue
                if (work / RESULT).exists():  # another process has finished meanwhile, and deleted the parts
                    break
                measurement = evaluation.measurements[job.side]
                measurement.measure(files[job.side], job.part, job.bounds, progress.advance)
                num_made += 1
                progress.end_part()
            finally:
                claims.release(number)
        progress.end_part()  # what others have recorded meanwhile
    return num_made
