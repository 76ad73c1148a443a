"""Telemetry of training: times the steps and writes the rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pomscale.base.clock import Clock
from pomscale.distributed.stragglers import Stragglers
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.monitor import Monitor
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import StepTimer
from pomscale.runs.ledger import Ledger
from pomscale.training.process import Process

T = TypeVar("T")

Row = dict[str, float | str]
"""Names of runs.metric_names -> values."""


@dataclass(frozen=True)
class Records:
    """The records of one start of a run: rows of metrics, the ledger of its time, and alerts."""

    monitor: Monitor
    ledger: Ledger
    alerts: Alerts


@dataclass
class Telemetry:
    """Collects the losses, norms and times of the steps since the last row, and writes the next row.

    progress: how far the run is at a clock (learning rate, epochs, faults), as the part of a row. mfu: samples per
    second -> model FLOPs utilisation, None where the device's peak is not known.
    """

    process: Process
    records: Records
    profiler: ProfileWindow
    stragglers: Stragglers
    every_samples: int
    progress: Callable[[Clock], Row]
    mfu: Callable[[float], float] | None
    timer: StepTimer = field(default_factory=StepTimer)
    _host: HostStats = field(default_factory=HostStats, init=False)
    # Values of the steps since the last row, each with its weight in the mean.
    _losses: list[tuple[float, float]] = field(default_factory=list, init=False)
    _norms: list[tuple[float, float]] = field(default_factory=list, init=False)
    _alignments: list[tuple[float, float]] = field(default_factory=list, init=False)
    _is_warm: bool = field(default=False, init=False)

    def next_batch(self, batches: Iterator[T], samples: int) -> T:
        """Begin a step: return the next of `batches`, and measure how long it took to come."""
        self.records.ledger.charge("other")
        self.profiler.step(samples)
        with self.timer.data_wait():
            batch = next(batches)
        self.records.ledger.charge("data_wait")
        return batch

    def charge_step(self) -> None:
        """Charge the time of a step; the first step of a process compiles and allocates, which is charged apart."""
        self.records.ledger.charge("step" if self._is_warm else "compile")
        self._is_warm = True

    def count_step(self, loss: float, norm: float, num_samples: int, alignment: float | None = None) -> None:
        """Count a step that the optimiser has taken. alignment: its alignment loss, None where it had none."""
        self._losses.append((loss, num_samples))
        if alignment is not None:
            self._alignments.append((alignment, 1.0))
        self._norms.append((norm, 1.0))
        self.timer.count_step(num_samples)

    def discard_steps(self) -> None:
        """Leave the losses since the last row out of the next one: the run has gone back to before them."""
        self._losses, self._norms, self._alignments = [], [], []

    def log(self, clock: Clock) -> None:
        """Write a row on the steps since the last one. A collective. Superseded if a newer start has taken over."""
        self.process.check_start()
        speed = self.timer.metrics()
        row: Row = {
            **self._means(),
            **self.progress(clock),
            **speed,
            "memory/peak_gib": peak_memory_gib(),
            **self._host.metrics(),
        }
        if speed:
            row |= self._ranks(speed)
            if self.mfu is not None:
                row["speed/mfu"] = self.mfu(speed["speed/samples_per_s"])
        self.records.ledger.write(clock.samples)
        self.records.alerts.check_row(clock.samples, speed.get("speed/step_time_s"))
        self.records.monitor.log(clock.samples, {**row, **self.records.ledger.metrics()})

    def _means(self) -> Row:
        """Mean loss over the samples, and mean norm over the steps, since the last row; empty if none was taken."""
        found = {"train/loss": self._losses, "train/alignment_loss": self._alignments, "train/grad_norm": self._norms}
        self.discard_steps()
        return {name: _weighted_mean(values) for name, values in found.items() if values}

    def _ranks(self, speed: dict[str, float]) -> Row:
        """Compare the ranks, and warn if one of them holds up the others. A collective."""
        step_time_s = speed["speed/step_time_s"]
        report = self.stragglers.report(step_time_s, step_time_s * speed["speed/data_wait_share"])
        if report.warning is not None:
            self.process.warn(report.warning)
        return report.metrics


def _weighted_mean(values: Sequence[tuple[float, float]]) -> float:
    """Return the mean of (value, weight)s; equal weights leave no trace in its last bits."""
    first = values[0][1]
    return math.fsum(value * (weight / first) for value, weight in values) / math.fsum(w / first for _, w in values)
