from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from pomscale.config.hardware import peak_flops
from pomscale.config.train import ProfileConfig
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import StepTimer, mfu
from pomscale.runs.metric_names import METRICS


def test_step_timer_arithmetic() -> None:
    now = 0.0
    timer = StepTimer(clock=lambda: now)
    for _ in range(4):
        with timer.data_wait():
            now += 0.5
        now += 1.5
        timer.count_step(64)
    with timer.paused():
        now += 100.0
    assert timer.metrics() == {
        "speed/samples_per_s": 32.0,
        "speed/step_time_s": 2.0,
        "speed/data_wait_share": 0.25,
    }
    assert timer.metrics() == {}  # a new interval without a step
    now += 1.0
    timer.count_step(64)
    assert timer.metrics()["speed/samples_per_s"] == 64.0


@pytest.mark.parametrize(
    ("device_name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("Intel(R) Xeon(R)", "bf16", None),
    ],
)
def test_peak_flops(device_name: str, precision: str, expected: float | None) -> None:
    assert peak_flops(device_name, precision) == expected  # type: ignore[arg-type]


def test_mfu() -> None:
    assert mfu(samples_per_s=1000.0, training_flops_per_sample=1e12, num_devices=4, peak=1e15) == 0.25


def test_host_stats_and_peak_memory() -> None:
    metrics = HostStats().metrics()
    assert metrics.keys() <= METRICS.keys()
    assert 0.0 <= metrics["host/cpu_percent"] <= 100.0
    # torch alone needs more than 50 MiB; a wrong unit of ru_maxrss would be off by 1024.
    assert 0.05 < metrics["host/process_memory_gib"] < metrics["host/memory_gib"]
    if not torch.cuda.is_initialized():
        assert 0.9 * metrics["host/process_memory_gib"] < peak_memory_gib() < 100.0


def _train(run_folder: Path, start_samples: int, num_steps: int = 6) -> list[str]:
    """Steps of 8 samples with a window of 2 steps from sample 16 on; names of the operators in the trace."""
    model = torch.nn.Linear(4, 4)
    window = ProfileWindow(ProfileConfig(start_samples=16, num_steps=2), run_folder, rank=0, device=torch.device("cpu"))
    for samples in range(start_samples, start_samples + 8 * num_steps, 8):
        window.step(samples)
        with torch.profiler.record_function(f"step at {samples}"):
            model(torch.ones(2, 4)).sum().backward()
    window.close()
    path = run_folder / "profile" / "rank-0-trace.json.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt") as trace:
        return [event.get("name", "") for event in json.load(trace)["traceEvents"]]


def test_profile_window_records_its_steps_once(tmp_path: Path) -> None:
    names = _train(tmp_path, start_samples=0)
    assert {name for name in names if name.startswith("step at")} == {"step at 16", "step at 24"}
    assert "aten::addmm" in names
    assert "[memory]" in names


def test_profile_window_cut_short_by_the_end_of_the_run_is_written(tmp_path: Path) -> None:
    names = _train(tmp_path, start_samples=0, num_steps=3)
    assert {name for name in names if name.startswith("step at")} == {"step at 16"}


def test_profile_window_in_the_past_or_absent_does_nothing(tmp_path: Path) -> None:
    assert _train(tmp_path, start_samples=40) == []
    window = ProfileWindow(None, tmp_path, rank=0, device=torch.device("cpu"))
    window.step(0)
    window.close()
    assert not (tmp_path / "profile").exists()
