"""An order of the tests in which the workers of pytest-xdist keep both cores busy to the end.

`--dist worksteal` gives each worker one contiguous part of as many tests, and lets a worker that has done its part take
over half of what another one has left, from the end of that. So every part here begins with modules that start
processes, and ends with short tests: a worker that stands idle finds some, and no long test is begun last. A module
stays in one part, since its tests share fixtures.

SLURM's tests wait, mostly, for SLURM's own clocks. Half of the workers begin with them, so that a cluster is started by
these workers alone, and the other half keeps the processor busy meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

_WAITING, _STARTING = "tests/slurm/", ("tests/distributed/", "tests/e2e/")


def dealt(items: Sequence[pytest.Item], num_workers: int) -> list[pytest.Item]:
    """Return the tests in that order, for at least two workers."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    waiting: list[list[pytest.Item]] = []
    long: list[list[pytest.Item]] = []
    short: list[pytest.Item] = []
    for name, module in modules.items():
        if name.startswith(_WAITING):
            waiting.append(module)
        elif name.startswith(_STARTING) or any(map(_is_slow, module)):
            long.append(sorted(module, key=_is_no_tour))
        else:
            short += module
    parts: list[list[pytest.Item]] = [[] for _ in range(num_workers)]
    _deal(waiting, parts[: num_workers // 2])
    _deal(sorted(long, key=_length, reverse=True), parts[num_workers // 2 :])
    for part in parts:
        room = len(items) // num_workers - len(part)
        part.extend(short[: max(room, 0)])
        del short[: max(room, 0)]
    return [item for part in [*parts, short] for item in part]


def _deal(modules: list[list[pytest.Item]], parts: list[list[pytest.Item]]) -> None:
    for number, module in enumerate(modules):
        parts[number % len(parts)].extend(module)


def _length(module: list[pytest.Item]) -> tuple[bool, int]:
    """Return what modules are sorted by: those with a quickstart, then those with many slow tests."""
    return not all(map(_is_no_tour, module)), sum(map(_is_slow, module))


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _is_no_tour(item: pytest.Item) -> bool:
    return "quickstart" not in item.nodeid
