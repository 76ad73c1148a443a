"""The index of this process among several that share one piece of work: `--task 3/1000`, a SLURM array or torchrun."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pomscale.base.errors import InputError


@dataclass(frozen=True)
class TaskIndex:
    """Task number `index` of `count`.

    It says only where a task begins: afterwards the task takes whatever parts no other task has claimed.
    """

    index: int = 0
    count: int = 1

    def owns(self, part: int) -> bool:
        """Return whether the part is one of those that this task begins with."""
        return part % self.count == self.index

    def order(self, num_parts: int) -> list[int]:
        """Return all parts, those of this task first; so tasks meet as late as possible."""
        return sorted(range(num_parts), key=lambda part: ((part - self.index) % self.count, part))


def this_task(text: str | None) -> TaskIndex:
    """Return the task that "INDEX/COUNT" (0-based) names; with None, that of SLURM's or torchrun's environment.

    Without such an environment it is the only task. Raises InputError for a text that names no task.
    """
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise InputError(f"--task {text!r}: give INDEX/COUNT with INDEX from 0 to COUNT - 1, e.g. 3/1000")
        return TaskIndex(int(match[1]), int(match[2]))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    array = TaskIndex(
        (int(os.environ.get("SLURM_ARRAY_TASK_ID", first)) - first) // step,
        int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")),
    )
    if "RANK" in os.environ:
        process = TaskIndex(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        process = TaskIndex(int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    return TaskIndex(array.index * process.count + process.index, array.count * process.count)
