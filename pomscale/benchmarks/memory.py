"""Memory of a piece of Python, measured in a process of its own, and of tensors that a call makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# It samples private memory (RssAnon): RSS also has pages of mapped files, which the kernel can reclaim at any time.
_WATCH = """
import re, threading, time
_peak = 0
def _watch():
    global _peak
    while True:
        with open("/proc/self/status") as stream:
            _peak = max(_peak, int(re.search(r"RssAnon:\\s+(\\d+)", stream.read())[1]))
        time.sleep(0.02)
threading.Thread(target=_watch, daemon=True).start()
"""


def peak_private_mib(code: str, *arguments: str) -> float:
    """Return the peak of a process that runs `code` with these arguments, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", f"{_WATCH}\n{code}\nprint(_peak)", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1]) / 1024


def peak_allocated_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that torch's allocator held during step(), less those that it held before.

    On a CPU they are counted by torch's profiler, which sees every allocation of tensors, also inside one operator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = peak = 0
    for change in _allocations(step):
        live += change
        peak = max(peak, live)
    return peak


def kept_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return how many more bytes torch's allocator holds after step() than before, counted as above."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before
    return sum(_allocations(step))


def _allocations(step: Callable[[], object]) -> list[int]:
    """Return the bytes that step() allocates on the CPU, negative where it frees some, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
