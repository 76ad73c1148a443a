"""Evaluate pictures: any number of processes measure parts, and the one that finds all of them done computes metrics.

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
from pomscale.base.console import Progress
from pomscale.base.files import make_folder, write_text
from pomscale.base.task_index import TaskIndex
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.finishing import finish
from pomscale.evaluation.generated.pictures_out import check_no_tars
from pomscale.evaluation.generated.work_folder import RESULT, PartFiles, adopt, drop_parts


@dataclass(frozen=True)
class Outcome:
    """The outcome of one process.

    Attributes:
        work: The shared folder.
        result: The result as JSON; None while other processes are at work.
        num_parts: Parts of all sides.
        num_made: Parts that this process measured.
        num_elsewhere: Parts that are not done yet.
    """

    work: Path
    result: dict[str, Any] | None
    num_parts: int
    num_made: int
    num_elsewhere: int


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
        publish: Called with the result by the process that computes it, before it is marked as done.
        progress: Show progress on standard error.

    Raises:
        InputError: More pictures cannot be read than are allowed, or the work folder is another evaluation's.
        PomscaleError: A file cannot be written, or storage fails.
    """
    work, jobs = evaluation.work(), evaluation.jobs()
    make_folder(work)
    with Claims(work, several=task.count > 1) as claims:
        with claims.listing():
            is_new = adopt(work, evaluation.plan())
            if is_new and evaluation.request.outputs.tars is not None:
                make_folder(evaluation.request.outputs.tars)
                check_no_tars(evaluation.request.outputs.tars)
        num_made = 0 if (work / RESULT).exists() else _make_parts(evaluation, claims, task, progress)
        files = {side: PartFiles(work, side) for side in evaluation.measurements}
        with claims.finishing():
            if (work / RESULT).exists():
                result: dict[str, Any] = json.loads((work / RESULT).read_text(encoding="utf-8"))
                return Outcome(work, result, len(jobs), num_made, 0)
            left = [job for job in jobs if not evaluation.measurements[job.side].is_done(files[job.side], job.part)]
            if left:
                return Outcome(work, None, len(jobs), num_made, len(left))
            result = finish(evaluation, work, files)
            publish(result)
            write_text(work / RESULT, json.dumps(result, indent=1))
            drop_parts(work)
    return Outcome(work, result, len(jobs), num_made, 0)


def _make_parts(evaluation: Evaluation, claims: Claims, task: TaskIndex, shows: bool) -> int:
    """Measure the parts that nobody else has claimed, until there is none; return their number."""
    jobs, work = evaluation.jobs(), evaluation.work()
    files = {side: PartFiles(work, side) for side in evaluation.measurements}
    num_made = 0
    total = sum(job.bounds[1] - job.bounds[0] for job in jobs)
    with Progress("pictures", total, enabled=shows) as progress:
        for number in task.order(len(jobs)):
            job = jobs[number]
            measurement = evaluation.measurements[job.side]
            if not claims.claim(number):
                progress.skip(job.bounds[1] - job.bounds[0])
                continue
            try:
                if measurement.is_done(files[job.side], job.part):
                    progress.skip(job.bounds[1] - job.bounds[0])
                    continue
                if (work / RESULT).exists():  # another process has finished meanwhile, and deleted the parts
                    break
                measurement.measure(files[job.side], job.part, job.bounds, progress.advance)
                num_made += 1
            finally:
                claims.release(number)
    return num_made
