"""Figures of a slow rank; those of its GPU come from a program that answers as nvidia-smi does."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from pomscale.distributed import own_figures as of_figures
from pomscale.distributed.own_figures import gpu_figures, own_figures
from pomscale.runs.metric_names import METRICS

# As nvidia-smi 535 and later; older ones know the last field as clocks_throttle_reasons.active, and end with 2.
SMI = """#!/bin/sh
case "$*" in
*--id=GPU-12*{reasons}*) echo "{answer}" ;;
*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
esac
"""


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, reasons: str = "clocks_event_reasons") -> None:
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(answer=answer, reasons=reasons))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(of_figures, "_TIMEOUT_S", 90.0)  # a busy machine may start even a script late


@pytest.mark.parametrize("reasons", ["clocks_event_reasons", "clocks_throttle_reasons"])
def test_a_gpu_that_is_throttled_says_why(reasons: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, "1005, 1980, 84, 512.50, 100, 71680, 0x0000000000000061", reasons)
    figures = gpu_figures("GPU-12")
    assert figures == {
        "straggler/gpu_clock_mhz": 1005.0,
        "straggler/gpu_max_clock_mhz": 1980.0,
        "straggler/gpu_temperature_c": 84.0,
        "straggler/gpu_power_w": 512.5,
        "straggler/gpu_percent": 100.0,
        "straggler/gpu_memory_gib": 70.0,
        "straggler/gpu_throttled_by": "sw_thermal_slowdown hw_thermal_slowdown",
    }
    assert figures.keys() <= METRICS.keys()


def test_what_a_gpu_does_not_tell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, "1980, 1980, 40, [N/A], [Not Supported], 1024, 0x0000000000000001")
    assert gpu_figures("GPU-12") == {
        "straggler/gpu_clock_mhz": 1980.0,
        "straggler/gpu_max_clock_mhz": 1980.0,
        "straggler/gpu_temperature_c": 40.0,
        "straggler/gpu_memory_gib": 1.0,
        "straggler/gpu_throttled_by": "",
    }


@pytest.mark.parametrize("answer", ["No devices were found", "1005, 1980, ERR!, 512.50, 100, 71680, 0x01", ""])
def test_a_complaint_is_no_figure(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, answer)
    assert gpu_figures("GPU-12") == {}


def test_without_nvidia_smi_or_with_one_that_fails_there_are_no_gpu_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_figures("GPU-12") == {}
    _install(tmp_path, monkeypatch, "", reasons="no such reasons")
    assert gpu_figures("GPU-12") == {}


def test_the_host_of_a_rank_without_a_gpu() -> None:
    figures = own_figures(torch.device("cpu"))
    assert figures.keys() <= METRICS.keys()
    assert not [name for name in figures if "gpu" in name]
    memory_gib, process_gib = figures["straggler/memory_gib"], figures["straggler/process_memory_gib"]
    assert isinstance(memory_gib, float)
    assert isinstance(process_gib, float)
    assert 0.05 < process_gib < memory_gib
