"""Memory of a piece of Python, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

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
