"""Steps that all ranks take together: either all succeed, or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pomscale.base.errors import PomscaleError

T = TypeVar("T")


def on_all_ranks(step: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """Call `step` on each rank, and return all results on every rank. A collective; results are small and picklable.

    Where it raises PomscaleError or OSError, every rank raises the error of the first rank that failed.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = (step(), None)
    except (PomscaleError, OSError) as error:
        outcome = (None, error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group)
    problem = next((problem for _, problem in outcomes if problem is not None), None)
    if problem is None:
        return [result for result, _ in outcomes]
    try:
        raise problem
    finally:
        # An error refers to the frames it went through: as a variable of one it would keep them and the group for ever.
        del outcome, outcomes, problem


def on_main_rank(step: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call `step` on rank 0 alone, and return its result, or raise its error, on every rank; see `on_all_ranks`."""
    is_main = dist.get_rank(group) == 0
    results: list[Any] = on_all_ranks(lambda: step() if is_main else None, group)
    return results[0]
