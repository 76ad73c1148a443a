"""`pomscale bench logging`: cost of a row of metrics for a training step, with metrics.jsonl, console and wandb.

A row has all that the trainer logs: host statistics, ledger, alerts, monitor. The call itself holds up the step; then
threads, and wandb's own process, write the row beside the next step. They can take at most their processor time from
the step, which is measured without a step: the durations of single steps vary by more than that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import psutil
import torch

from pomscale.benchmarks.report import BenchReport
from pomscale.config.model import ImageModelConfig
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.models import DiPoM, init_weights
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.monitor import open_monitor
from pomscale.runs.ledger import Ledger

_SHAPE, _NUM_CLASSES = (4, 32, 32), 10
_WARM_UP_STEPS = 3


def bench_logging(*, batch: int, num_steps: int, num_rows: int) -> BenchReport:
    """Measure the cost of rows.

    Args:
        batch: samples per step.
        num_steps: steps measured, every second one after a row.
        num_rows: rows written without steps.
    """
    report = BenchReport("logging")
    held_s: list[float] = []
    after_row_s: list[float] = []
    after_none_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary, ExitStack() as stack:
        log = _Log(Path(temporary), stack)
        step = _training_step(batch)
        for _ in range(_WARM_UP_STEPS):
            step()
            log()
        for number in range(num_steps):
            start_s = time.perf_counter()
            if number % 2:
                log()
                held_s.append(time.perf_counter() - start_s)
            step()
            (after_row_s if number % 2 else after_none_s).append(time.perf_counter() - start_s)
        row_cpu_s = _cpu_per_row(log, num_rows)
    step_s, row_s = statistics.median(after_none_s), statistics.median(held_s)
    report.add("step, DiPoM-S/2", batch=batch, step_s=step_s, num_steps=len(after_none_s))
    report.add("row and step", batch=batch, step_s=statistics.median(after_row_s), num_steps=len(after_row_s))
    report.add("row, call", held_ms=1e3 * row_s, longest_ms=1e3 * max(held_s), num_metrics=log.num_metrics)
    report.add("row, processor time of all threads and of wandb", cpu_ms=1e3 * row_cpu_s, num_rows=num_rows)
    report.compare("a row's call over a step", row_s / step_s, 0.01, at_least=False)
    report.compare("a row's processor time over a step", row_cpu_s / step_s, 0.01, at_least=False)
    return report


def _cpu_per_row(log: Callable[[], None], num_rows: int) -> float:
    """Return the processor time per row of this process and of wandb's, until the last row is written."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def spent_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    start_s = spent_s()
    for _ in range(num_rows):
        log()
        time.sleep(0.01)
    time.sleep(2.0)
    return (spent_s() - start_s) / num_rows


def _training_step(batch: int) -> Callable[[], None]:
    """Return a step on one random batch: forward, backward and optimiser, waiting for the loss as the trainer does."""
    values = {"preset": "dipom-s-2", "latent_shape": _SHAPE, "num_classes": _NUM_CLASSES}
    config = ImageModelConfig.model_validate(values)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DiPoM(config).to(device)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, target = torch.randn(2, batch, *_SHAPE, device=device)
    t, condition = torch.rand(batch, device=device), torch.randint(_NUM_CLASSES, (batch,), device=device)

    def step() -> None:
        loss = (model(x, t, condition) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


class _Log:
    """Log of rows as the trainer writes them, with every sink open."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._host = HostStats()
        self._ledger = stack.enter_context(Ledger(folder, 0, 0))
        monitoring = MonitoringConfig(wandb=WandbConfig(mode="offline"))
        console = stack.enter_context((folder / "console.txt").open("w", encoding="utf-8"))
        with redirect_stdout(console):
            self._monitor = stack.enter_context(
                open_monitor(folder, monitoring, run_name="bench", recipe_dump={}, total_samples=10**9, start=0)
            )
        self._alerts = Alerts(monitoring.alerts, self._monitor, self._ledger)
        self._samples = 0
        self.num_metrics = 0

    def __call__(self) -> None:
        self._samples += 8
        self._ledger.charge("step")
        metrics: dict[str, float | str] = {
            "train/loss": 1.0 / self._samples,
            "train/grad_norm": 1.0,
            "train/learning_rate": 1e-4,
            "data/epoch": self._samples / 1e6,
            "data/bad_samples": 0,
            "faults/skipped_steps": 0,
            "speed/samples_per_s": 100.0,
            "speed/step_time_s": 0.1,
            "speed/data_wait_share": 0.01,
            "speed/mfu": 0.4,
            "memory/peak_gib": peak_memory_gib(),
            **self._host.metrics(),
            "ranks/compute_slowdown": 1.0,
            "ranks/slowest_rank": 0,
            "ranks/slowest_host": "bench",
            "ranks/data_wait_excess_share": 0.0,
            "ranks/data_wait_rank": 0,
        }
        self._ledger.write(self._samples)
        self._alerts.check_row(self._samples, 0.1)
        metrics |= self._ledger.metrics()
        self._monitor.log(self._samples, metrics)
        self.num_metrics = len(metrics)
