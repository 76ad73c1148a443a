"""Which of several encodes of one recipe is this: `--task 3/1000`, a SLURM array, torchrun, or all three."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pomscale.base.errors import InputError


@dataclass(frozen=True)
class Task:
    """Task `index` of `count`. Only where a task begins: it goes on with whatever parts nobody else has claimed."""

    index: int = 0
    count: int = 1

    def owns(self, part: int) -> bool:
        """Whether the part is one of those that this task begins with."""
        return part % self.count == self.index

    def order(self, num_parts: int) -> list[int]:
        """All parts, those of this task first; tasks then meet as late as possible."""
        return sorted(range(num_parts), key=lambda part: ((part - self.index) % self.count, part))


def this_task(text: str | None) -> Task:
    """From "INDEX/COUNT" (0-based), or, with None, from SLURM's or torchrun's environment; else the only task.

    InputError for a text that is no task.
    """
    if text is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise InputError(f"--task {text!r}: give INDEX/COUNT with INDEX from 0 to COUNT - 1, e.g. 3/1000")
        return Task(int(match[1]), int(match[2]))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    array = Task(
        (int(os.environ.get("SLURM_ARRAY_TASK_ID", first)) - first) // step,
        int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")),
    )
    if "RANK" in os.environ:
        process = Task(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        process = Task(int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    return Task(array.index * process.count + process.index, array.count * process.count)
