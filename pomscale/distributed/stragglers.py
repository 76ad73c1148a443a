"""Search for the rank that holds the others up.

Sharded training waits for all ranks several times a step, so every rank's step takes as long as the slowest one's: step
times show that a run is slow, but not which rank makes it slow. Two times that depend on one rank alone are measured at
the logging interval instead: a fixed amount of computation (a throttled GPU, a busy core), and the wait for its data (a
slow disk or network). One all-gather collects these numbers. Only a rank that is found slow reports figures of its host
and its GPU: those of every GPU of a large run would hide the one that matters.
"""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from pomscale.distributed.own_figures import own_figures
from pomscale.distributed.probe import MatmulProbe
from pomscale.distributed.world import World

_FACTOR = 1.3  # a rank that takes this many times the median is worth a warning
_NUM_IN_A_ROW = 3  # reports in a row before a warning: anything can be slow once


@dataclass(frozen=True)
class StragglerReport:
    """Report, the same on all ranks.

    Attributes:
        metrics: ranks/*, see runs.metric_names.
        warning: a message for people, when it is due.
        named: the rank that has been slowest for a multiple of _NUM_IN_A_ROW reports.
    """

    metrics: dict[str, float | str]
    warning: str | None
    named: int | None = None


class Stragglers:
    """Comparison of ranks over the reports of a run. All ranks make it together: it gathers the host names."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts = [str(host) for host in world.gather(socket.gethostname())]
        on_gpu = world.device.type == "cuda"
        self._probe = MatmulProbe(world.device, torch.bfloat16 if on_gpu else torch.float32)
        self._slow_rank: int | None = None
        self._in_a_row = 0

    def report(self, step_time_s: float, data_wait_s: float) -> StragglerReport:
        """Measure this rank and compare all. A collective of a few milliseconds; waits for the device.

        A world of one rank has nothing to report. Where a rank is named, a second collective brings its straggler/*
        figures, and takes as long as measuring them.

        Args:
            step_time_s: this rank's mean per step since the last report.
            data_wait_s: this rank's mean wait for data per step since the last report.
        """
        if self._world.size == 1:
            return StragglerReport({}, None)
        mine = torch.tensor(
            [self._probe.seconds(), data_wait_s, step_time_s], dtype=torch.float64, device=self._world.device
        )
        gathered = [torch.empty_like(mine) for _ in range(self._world.size)]
        dist.all_gather(gathered, mine)
        report = self.compare(*torch.stack(gathered, dim=1).tolist())  # waits for the device once, not once per rank
        if report.named is None:
            return report
        own = own_figures(self._world.device) if self._world.rank == report.named else None
        figures: Any = self._world.gather(own)[report.named]
        return replace(report, metrics={**report.metrics, "straggler/rank": report.named, **figures})

    def compare(self, probe_s: list[float], data_wait_s: list[float], step_time_s: list[float]) -> StragglerReport:
        """Return the report on figures of all ranks, in rank order, and remember which rank was slow."""
        step = statistics.median(step_time_s)
        compute = _excess(probe_s, statistics.median(probe_s))
        data = _excess(data_wait_s, step)  # a rank that waits for data for half a step makes the step half longer
        metrics: dict[str, float | str] = {
            "ranks/compute_slowdown": 1.0 + compute.excess,
            "ranks/slowest_rank": compute.rank,
            "ranks/slowest_host": self._hosts[compute.rank],
            "ranks/data_wait_excess_share": data.excess,
            "ranks/data_wait_rank": data.rank,
        }
        worst, what = max((compute, "computes"), (data, "waits for its data"), key=lambda found: found[0].excess)
        if 1.0 + worst.excess <= _FACTOR:
            self._slow_rank, self._in_a_row = None, 0
            return StragglerReport(metrics, None)
        self._in_a_row = self._in_a_row + 1 if worst.rank == self._slow_rank else 1
        self._slow_rank = worst.rank
        warning = None
        if self._in_a_row == _NUM_IN_A_ROW:  # once, not at every report from here on
            warning = (
                f"rank {worst.rank} on {self._hosts[worst.rank]} {what} {1.0 + worst.excess:.2f} times as long as the "
                f"median rank, {_NUM_IN_A_ROW} reports in a row: all {self._world.size} ranks wait for it"
            )
        return StragglerReport(metrics, warning, None if self._in_a_row % _NUM_IN_A_ROW else worst.rank)


@dataclass(frozen=True)
class _Excess:
    rank: int
    excess: float


def _excess(values: list[float], unit: float) -> _Excess:
    """Return the rank of the largest value, and by how many units it is above the median."""
    rank = max(range(len(values)), key=values.__getitem__)
    return _Excess(rank, (values[rank] - statistics.median(values)) / unit)
