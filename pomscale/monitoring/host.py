"""CPU and memory in use by the host and by this process."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

GIB = 2**30


class HostStats:
    """CPU and memory of the host. CPU use is the mean since the previous call, the first time since construction."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # psutil measures between two calls: this is the first

    def metrics(self) -> dict[str, float]:
        """Return the host/* metrics, in percent and GiB."""
        memory = psutil.virtual_memory()
        return {
            "host/cpu_percent": psutil.cpu_percent(),
            "host/memory_gib": (memory.total - memory.available) / GIB,
            "host/process_memory_gib": self._process.memory_info().rss / GIB,
        }


def peak_memory_gib() -> float:
    """Return the peak memory of this process so far in GiB: allocated on its GPU if it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes on macOS, KiB on Linux
