"""Times and memory of steps that take turns, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """The least seconds of a step over its turns: on the wall's clock, and of the device.

    busy_s is the time of all of the process's threads on a CPU, and between two events of the stream on a GPU.
    """

    wall_s: float
    busy_s: float

    def __or__(self, other: Times) -> Times:
        """Return the lesser of each."""
        return Times(min(self.wall_s, other.wall_s), min(self.busy_s, other.busy_s))


def measured(step: Callable[[], object], device: torch.device) -> Times:
    """Return the times of one call."""
    if device.type != "cuda":
        wall_s, busy_s = time.perf_counter(), time.process_time()
        step()
        return Times(time.perf_counter() - wall_s, time.process_time() - busy_s)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    wall_s = time.perf_counter()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return Times(time.perf_counter() - wall_s, begin.elapsed_time(end) / 1000)


def take_turns(steps: Mapping[K, Callable[[], object]], device: torch.device, num_turns: int) -> dict[K, Times]:
    """Return the least times of each step over `num_turns` rounds of all steps. The caller has warmed them up."""
    least: dict[K, Times] = {}
    for _ in range(num_turns):
        for key, step in steps.items():
            times = measured(step, device)
            least[key] = least[key] | times if key in least else times
    return least
