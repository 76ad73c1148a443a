"""Whether the kernel has killed a process because memory ran out: the signal SIGKILL alone does not show it."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def num_out_of_memory_kills(cgroups: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> int:
    """Return how many processes of this process's control group the kernel has killed for lack of memory so far.

    The number is 0 where the kernel does not count: without control groups for memory, every SIGKILL is taken to have
    been sent by somebody.
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
