"""Figures of this process, its host and its GPU that may explain why a rank is slow."""

from __future__ import annotations

import os
import socket
import subprocess

import psutil
import torch

_GIB = 2**30
_CPU_INTERVAL_S = 0.2
_TIMEOUT_S = 10.0

# Field of nvidia-smi -> name of the metric, and factor.
_GPU_FIGURES = {
    "clocks.sm": ("straggler/gpu_clock_mhz", 1.0),
    "clocks.max.sm": ("straggler/gpu_max_clock_mhz", 1.0),
    "temperature.gpu": ("straggler/gpu_temperature_c", 1.0),
    "power.draw": ("straggler/gpu_power_w", 1.0),
    "utilization.gpu": ("straggler/gpu_percent", 1.0),
    "memory.used": ("straggler/gpu_memory_gib", 1 / 1024),
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # names in newer and older drivers

# Bits of NVML's clocks event reasons. An idle GPU lowers its clock too: that is no reason to be slow.
_HELD_DOWN_BY = {
    0x02: "applications_clocks_setting",
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


def own_figures(device: torch.device) -> dict[str, float | str]:
    """Return straggler/* of this rank, see runs.metric_names; without a GPU and nvidia-smi those of the host alone.

    Takes a few tenths of a second.
    """
    memory = psutil.virtual_memory()
    figures: dict[str, float | str] = {
        "straggler/host": socket.gethostname(),
        "straggler/cpu_percent": psutil.cpu_percent(_CPU_INTERVAL_S),
        "straggler/load_per_cpu": os.getloadavg()[0] / (os.cpu_count() or 1),
        "straggler/memory_gib": (memory.total - memory.available) / _GIB,
        "straggler/process_memory_gib": psutil.Process().memory_info().rss / _GIB,
    }
    if device.type == "cuda":
        # A process may see only some GPUs of its node, so its own number says nothing to nvidia-smi.
        figures |= gpu_figures(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return figures


def gpu_figures(identity: str) -> dict[str, float | str]:
    """Return the figures of nvidia-smi on a GPU, given by UUID, index or bus id; empty where there are none."""
    for reasons in _REASONS:
        command = ["nvidia-smi", f"--id={identity}", "--format=csv,noheader,nounits"]
        command.append(f"--query-gpu={','.join([*_GPU_FIGURES, reasons])}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        except subprocess.CalledProcessError:
            continue  # this driver does not know the reasons by this name
        except (OSError, subprocess.TimeoutExpired):
            return {}
        try:
            return _parsed(done.stdout)
        except ValueError:
            return {}  # an error message: a GPU that makes its rank slow may well be damaged
    return {}


def _parsed(line: str) -> dict[str, float | str]:
    *values, active = (word.strip() for word in line.strip().split(","))
    figures: dict[str, float | str] = {}
    for value, (name, factor) in zip(values, _GPU_FIGURES.values(), strict=True):
        if not value.startswith("["):  # [N/A], [Not Supported]
            figures[name] = float(value) * factor
    if active.startswith("0x"):
        bits = int(active, 16)
        figures["straggler/gpu_throttled_by"] = " ".join(word for bit, word in _HELD_DOWN_BY.items() if bits & bit)
    return figures
