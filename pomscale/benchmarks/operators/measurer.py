"""Figures of one case: each contender is checked, warmed up, and measured in turns with the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

import psutil
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from pomscale.benchmarks.memory import peak_allocated_bytes
from pomscale.benchmarks.operators.cases import Case
from pomscale.benchmarks.operators.contenders import FLOOR, Contender
from pomscale.benchmarks.operators.entries import Entry
from pomscale.benchmarks.operators.gate import Check, as_tuple, check
from pomscale.benchmarks.operators.timing import Times, measured, take_turns
from pomscale.ops.pom.dispatch import CannotServeError

Pass: TypeAlias = Literal["forward", "training"]
PASSES: tuple[Pass, ...] = ("forward", "training")  # training is forward and backward
_MOST_RECOMPILATIONS = 1024
_UNITS_AT_ONCE = 20  # tensors as large as u that the hungriest rival holds


@dataclass(frozen=True)
class Row:
    """Figures of a contender in a case; without times if it did not pass its check or was left out.

    times and peak_units (memory over that of u) are by pass; over_floor is busy time over that of the bare GEMMs.
    """

    contender: str
    check: Check
    times: dict[Pass, Times] = field(default_factory=dict)
    peak_units: dict[Pass, float] = field(default_factory=dict)
    over_floor: dict[Pass, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the figures as they are written."""
        found: dict[str, Any] = {"contender": self.contender, "check": str(self.check), "error": self.check.error}
        for name in self.times:
            found[f"{name}_wall_s"], found[f"{name}_busy_s"] = self.times[name].wall_s, self.times[name].busy_s
            found[f"{name}_over_gemms"] = self.over_floor.get(name)
            found[f"{name}_peak_units"] = self.peak_units[name]
        return found


@contextmanager
def never_silently_eager() -> Iterator[None]:
    """Let torch.compile compile as often as cases need; by default it goes on uncompiled after eight times."""
    with dynamo_config.patch(
        recompile_limit=_MOST_RECOMPILATIONS,
        accumulated_recompile_limit=_MOST_RECOMPILATIONS,
        fail_on_recompile_limit_hit=True,
    ):
        yield


class Measurer:
    """Measures cases, and remembers the checks that small cases of the same kind have passed."""

    def __init__(self, contenders: Sequence[Contender], device: torch.device, num_turns: int) -> None:
        self._contenders, self._device, self.num_turns = contenders, device, num_turns
        self._checks: dict[tuple[str, Case], Check] = {}

    def measure(self, case: Case, budget_s: float = float("inf")) -> list[Row]:
        """Measure all contenders in a case; those whose turns would take more than the budget are left out.

        Raises CannotServeError if the case does not fit in memory.
        """
        needed, free = _UNITS_AT_ONCE * case.unit_bytes, free_bytes(self._device)
        if needed > free:
            raise CannotServeError(f"it may need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
        deadline_s = time.monotonic() + budget_s
        rows: dict[str, Row] = {}
        steps: dict[tuple[str, Pass], Callable[[], object]] = {}
        for contender in self._contenders:
            row, entry = self._prepared(contender, case, deadline_s)
            rows[contender.name] = row
            if entry is not None:
                steps |= {(contender.name, name): step for name, step in self._steps(entry).items()}
        least = take_turns(steps, self._device, self.num_turns)
        for name, row in rows.items():
            times = {one: least[name, one] for one in PASSES if (name, one) in least}
            over = {one: t.busy_s / least[FLOOR, one].busy_s for one, t in times.items() if (FLOOR, one) in least}
            rows[name] = replace(row, times=times, over_floor=over)
        return list(rows.values())

    def _prepared(self, contender: Contender, case: Case, deadline_s: float) -> tuple[Row, Entry | None]:
        """Check and warm up a contender. Returns its memory, and its layer if it can be measured."""
        found = self._check(contender, case)
        if not found.passed:
            return Row(contender.name, found), None
        try:
            entry = contender.build(case, self._device)
            steps = self._steps(entry)
            for step in steps.values():
                step()  # compiles, and warms up
            peaks = {name: peak_allocated_bytes(step, self._device) / case.unit_bytes for name, step in steps.items()}
            turn_s = sum(measured(step, self._device).wall_s for step in steps.values())
        except (CannotServeError, torch.OutOfMemoryError) as error:
            return Row(contender.name, Check(refused=str(error).splitlines()[0])), None
        if (needed_s := turn_s * self.num_turns) > deadline_s - time.monotonic():
            reason = f"its turns would take {needed_s:.0f} s; give more --seconds"
            return Row(contender.name, Check(refused=reason), peak_units=peaks), None
        return Row(contender.name, found, peak_units=peaks), entry

    def _check(self, contender: Contender, case: Case) -> Check:
        """Return the check of the small case of the kind, or that of a longer one where it is worse."""
        found = self._remembered(contender, case.checked)
        if not (contender.in_chunks and found.passed):
            return found
        longer = self._remembered(contender, case.checked_in_chunks)
        is_worse = not longer.passed or (longer.error or 0.0) > (found.error or 0.0)
        return longer if is_worse else found

    def _remembered(self, contender: Contender, checked: Case) -> Check:
        key = contender.name, checked
        if key not in self._checks:
            self._checks[key] = check(contender, checked, self._device)
        return self._checks[key]

    def _steps(self, entry: Entry) -> dict[Pass, Callable[[], object]]:
        x = entry.case.make_input(self._device)
        training_x = x.clone().requires_grad_()
        grads: list[Tensor] = []

        def forward() -> None:
            with torch.no_grad():
                entry(x)

        def training() -> None:
            outputs = as_tuple(entry(training_x))
            if not grads:
                grads.extend(torch.randn_like(y) for y in outputs)
            torch.autograd.backward(outputs, grads)
            entry.zero_grad(set_to_none=True)
            training_x.grad = None

        return {"forward": forward, "training": training}


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


def as_row(case: Case, row: Row) -> dict[str, Any]:
    """Return a row of the report."""
    return {"what": f"{case}, {row.contender}", **asdict(case), **row.figures()}


def turn_seconds(rows: Sequence[Row]) -> float:
    """Return the seconds that a turn of all contenders takes."""
    return sum(times.wall_s for row in rows for times in row.times.values())
