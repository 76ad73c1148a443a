"""`pomscale bench logging`: what a row of metrics costs a training step, with all sinks: metrics.jsonl, console, wandb.

Stretches of steps that each end with a row take turns with stretches without, in one process, so that both meet the
same machine. A row is what the trainer makes of it: host statistics, ledger, alerts and monitor. The threads that write
it run beside the next step, so what they take from it shows in the time of the step and not of the row.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import torch

from pomscale.benchmarks.report import BenchReport
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.config.schema import ModelConfig
from pomscale.models import DiPoM, init_weights
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.ledger import Ledger
from pomscale.monitoring.monitor import open_monitor

_SHAPE, _NUM_CLASSES = (4, 32, 32), 10
_WARM_UP_STEPS = 3


def bench_logging(*, batch: int, num_steps: int, num_turns: int) -> BenchReport:
    """batch: per step; num_steps: in each of num_turns stretches with rows, and as many without."""
    report = BenchReport("logging")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary, ExitStack() as stack:
        log = _Log(Path(temporary), stack)
        step = _training_step(batch)
        for _ in range(_WARM_UP_STEPS):
            step()
            log()
        held_s: list[float] = []
        with_rows_s: list[float] = []
        without_s: list[float] = []
        for _ in range(num_turns):
            for _ in range(num_steps):
                start_s = time.perf_counter()
                step()
                middle_s = time.perf_counter()
                log()
                held_s.append(time.perf_counter() - middle_s)
                with_rows_s.append(time.perf_counter() - start_s)
            time.sleep(0.1)  # the threads have written their rows
            for _ in range(num_steps):
                start_s = time.perf_counter()
                step()
                without_s.append(time.perf_counter() - start_s)
    step_s, step_with_row_s, row_s = map(statistics.median, (without_s, with_rows_s, held_s))
    num = num_steps * num_turns
    report.add("step, DiPoM-S/2, a row after each", batch=batch, step_s=step_with_row_s, num_steps=num)
    report.add("step, DiPoM-S/2, no rows", batch=batch, step_s=step_s, num_steps=num)
    report.add("row, all sinks", held_ms=1e3 * row_s, longest_ms=1e3 * max(held_s), num_metrics=log.num_metrics)
    report.judge("time that a row holds up its step, over the step", row_s / step_s, 0.01, at_least=False)
    report.judge("what steps with a row each take longer", step_with_row_s / step_s - 1, 0.01, at_least=False)
    return report


def _training_step(batch: int) -> Callable[[], None]:
    """Forward, backward and optimiser on the same random batch, waiting for the loss as the trainer does."""
    config = ModelConfig.model_validate({"preset": "dipom-s-2", "latent_shape": _SHAPE, "num_classes": _NUM_CLASSES})
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
    """A row as trainer.py logs it, with every sink open."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._host = HostStats()
        self._ledger = stack.enter_context(Ledger(folder, 0, 0))
        monitoring = MonitoringConfig(wandb=WandbConfig(mode="offline"))
        console = stack.enter_context((folder / "console.txt").open("w", encoding="utf-8"))
        with redirect_stdout(console):
            self._monitor = stack.enter_context(
                open_monitor(folder, monitoring, run_name="bench", recipe_dump={}, total_samples=10**9, incarnation=0)
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
        self._alerts.judge(self._samples, 0.1)
        metrics |= self._ledger.metrics()
        self._monitor.log(self._samples, metrics)
        self.num_metrics = len(metrics)
