"""`pomscale bench ops`: the mixer over tokens, sizes, forms and masks, beside named rivals, each gated by its check."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pomscale.base.console import Progress
from pomscale.base.errors import InputError
from pomscale.benchmarks.operators.cases import Case, DtypeLabel, FormLabel, MaskLabel
from pomscale.benchmarks.operators.contenders import contenders
from pomscale.benchmarks.operators.measurer import PASSES, Measurer, Row, as_row, never_silently_eager, turn_seconds
from pomscale.benchmarks.operators.official import Official
from pomscale.benchmarks.operators.picture import draw
from pomscale.benchmarks.report import BenchReport
from pomscale.ops.pom.dispatch import CannotServeError

_FIELDS = ("dim", "form", "degree", "expand", "mask", "batch", "dtype")


@dataclass(frozen=True)
class Sweep:
    """Settings to measure: the first value of every list is the base, and each other value replaces it alone.

    num_tokens are measured for every such setting. heads is the number of selection heads of the forms that have them.
    """

    num_tokens: tuple[int, ...]
    dim: tuple[int, ...] = (1152,)
    form: tuple[FormLabel, ...] = ("product",)
    degree: tuple[int, ...] = (2,)
    expand: tuple[int, ...] = (2,)
    mask: tuple[MaskLabel, ...] = ("none",)
    batch: tuple[int, ...] = (1,)
    dtype: tuple[DtypeLabel, ...] = ("fp32",)
    heads: int = 16

    def cases(self) -> list[Case]:
        """Return all cases, the smallest first, so that a budget that ends leaves out the largest.

        Raises InputError for sizes that no layer of ours has, such as heads that do not divide the channels.
        """
        base = Case(heads=self.heads, **{name: getattr(self, name)[0] for name in _FIELDS})
        curves = [base]
        for name in _FIELDS:
            curves += [replace(base, **{name: value}) for value in getattr(self, name)[1:]]
        for curve in curves:
            _check(curve)
        found = [replace(curve, num_tokens=number) for curve in curves for number in sorted(set(self.num_tokens))]
        return sorted(found, key=_size)


def _check(case: Case) -> None:
    try:
        with torch.device("meta"):
            case.make_layer()
    except ValueError as error:
        raise InputError(
            f"d {case.dim}, form {case.form}: {error}; choose another --dim, --expand or --heads"
        ) from error


def bench_operators(
    sweep: Sweep,
    official: Official,
    device: torch.device,
    *,
    with_compiled: bool = True,
    num_turns: int,
    seconds: float,
    out: Path | None,
    plot: Path | None,
) -> BenchReport:
    """Measure every case of a sweep.

    Args:
        sweep: Cases.
        official: The authors' layers that are at hand.
        device: Device to measure.
        with_compiled: Measure what torch.compile makes, too; each setting takes it many seconds on a CPU.
        num_turns: Turns of each contender in a case; the least time counts.
        seconds: Budget of the whole; cases and contenders that would not end in time are left out, and listed.
        out: JSON that is written again after each case, so that Ctrl-C keeps what is measured.
        plot: PNG for the curves, which Ctrl-C keeps, too.

    Returns:
        A row per case and contender; `failures` names those that are wrong.
    """
    report = BenchReport("operators")
    if forced := os.environ.get("POMSCALE_POM"):
        report.note(f"POMSCALE_POM={forced} forces the path of `ours`, too")
    if official.hom is None or official.pom is None:
        report.note("not all of the authors' layers are at hand: --official takes checkouts of their repositories")
    measurer = Measurer(contenders(official, device, with_compiled=with_compiled), device, num_turns)
    curves: dict[Case, dict[int, list[Row]]] = {}
    try:
        with never_silently_eager():
            for case, rows in _measured(measurer, sweep.cases(), seconds, report):
                curves.setdefault(case.curve, {})[case.num_tokens] = rows
                add_rows(report, case, rows)
                if out is not None:
                    report.save(out)
    finally:
        if plot is not None and curves:
            draw(curves).savefig(plot, dpi=120)
            print(f"wrote {plot}")
    return report


def _measured(
    measurer: Measurer, cases: Sequence[Case], seconds: float, report: BenchReport
) -> Iterator[tuple[Case, list[Row]]]:
    deadline_s = time.monotonic() + seconds
    taken_s: dict[Case, tuple[int, float]] = {}  # curve -> tokens of its last case, and seconds of its turns
    with Progress("tokens measured", sum(map(_size, cases))) as progress:
        for case in cases:
            left_s = deadline_s - time.monotonic()
            tokens, last_s = taken_s.get(case.curve, (case.num_tokens, 0.0))
            expected_s = last_s * case.num_tokens / tokens
            if expected_s >= left_s:
                report.note(f"{case}: left out, the budget ends before; give more --seconds")
            else:
                try:
                    rows = measurer.measure(case, left_s)
                except CannotServeError as error:
                    report.note(f"{case}: left out, {error}")
                else:
                    taken_s[case.curve] = case.num_tokens, measurer.num_turns * turn_seconds(rows)
                    yield case, rows
            progress.advance(_size(case))


def add_rows(report: BenchReport, case: Case, rows: Sequence[Row]) -> None:
    """Print the table of a case and add its rows to the report, and its failures."""
    print(f"\n{case}")
    print(f"  {'':<22}" + "".join(f"{name:>10} ms  /GEMMs  memory" for name in PASSES) + "   check", flush=True)
    for row in rows:
        report.rows.append(as_row(case, row))
        shown = "".join(
            f"{1000 * row.times[name].busy_s:>13.3f}{row.over_floor.get(name, float('nan')):>8.3f}"
            f"{row.peak_units[name]:>8.2f}"
            for name in row.times
        )
        print(f"  {row.contender:<22}{shown or ' ' * 58}   {row.check}", flush=True)
        if row.check.failed:
            report.failures.append(f"{case}, {row.contender}: {row.check}")


def _size(case: Case) -> int:
    return case.batch * case.num_tokens
