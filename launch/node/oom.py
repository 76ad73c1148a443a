"""Whether the kernel has killed something for want of memory: SIGKILL alone does not tell."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def num_out_of_memory_kills(cgroups: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> int:
    """Processes of this process's control group that were killed for want of memory so far.

    0 where the kernel does not say: without control groups for memory, every SIGKILL counts as one that somebody sent.
    """
    for line in _lines(cgroups):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: the count of a group holds those of the groups below it
            name, word = root / path.lstrip("/") / "memory.events", "oom_kill"
        elif "memory" in controllers.split(","):
            name, word = root / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill"
        else:
            continue
        for entry in _lines(name):
            key, _, value = entry.partition(" ")
            if key == word:
                return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # no such controller here
        return []
