"""`pomscale bench gpu-acceptance`: the mixer on a GPU against its targets, a line per target, passed or failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from pomscale.benchmarks.gpu_acceptance_lines import (
    H200,
    Sizes,
    aggregation_of_copy,
    attention_over_ours,
    official_over_ours,
    training_mfu,
    wrong_results,
)
from pomscale.benchmarks.operators.cases import FormLabel
from pomscale.benchmarks.operators.measurer import never_silently_eager
from pomscale.benchmarks.operators.official import Official
from pomscale.benchmarks.report import BenchReport
from pomscale.ops.pom.dispatch import CannotServeError

Measure = Callable[[], tuple[float, dict[str, Any]]]


@dataclass(frozen=True)
class Target:
    """A line: what is measured, the wanted value, and the measurement, which returns the value and its details."""

    what: str
    wanted: float
    measure: Measure
    at_least: bool = True


@dataclass(frozen=True)
class Verdict:
    """What became of a line.

    Attributes:
        what: What was measured.
        wanted: Wanted value.
        at_least: Whether the wanted value is the least, or the most.
        value: Measured value; None = there is none.
        passed: Whether the value is as wanted; None = nothing was measured, and nothing was asked for.
        reason: Why there is no value.
        seconds: Time that the line took.
        details: Figures that the value is made of.
    """

    what: str
    wanted: float
    at_least: bool
    value: float | None
    passed: bool | None
    reason: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "not run"}[self.passed]
        if self.value is None:
            return f"{word:<8}{self.what}: {self.reason}"
        relation = "at least" if self.at_least else "at most"
        return f"{word:<8}{self.what}: {self.value:.3g}, wanted {relation} {self.wanted:g} ({self.seconds:.0f} s)"


def bench_gpu_acceptance(
    device: torch.device, official: Official, *, seconds: float, sizes: Sizes = H200
) -> BenchReport:
    """Measure every line.

    Args:
        device: GPU. Tests give a CPU, with small sizes.
        official: The authors' layers; lines that compare with them are not run without.
        seconds: No line begins after so many seconds; one that does not begin has failed.
        sizes: Sizes of all measurements.

    Returns:
        A row per line; `failures` has those that failed.
    """
    report = BenchReport("gpu-acceptance")
    with never_silently_eager():
        for verdict in verdicts(targets(device, official, sizes), seconds):
            report.rows.append(asdict(verdict))
            print(verdict, flush=True)
            if verdict.passed is False:
                report.failures.append(verdict.what)
    return report


def targets(device: torch.device, official: Official, sizes: Sizes) -> list[Target]:
    """Return all lines; the first is correctness, without which the rest says nothing."""
    lines = [Target("paths that are wrong", 0, partial(wrong_results, sizes, device, official), at_least=False)]
    aggregations: list[tuple[FormLabel, str, float]] = [
        ("coefficients", "v2", 0.6),
        ("product", "v1, exact GELU", 0.3),
    ]
    for form, name, wanted in aggregations:
        what = f"aggregation, {name}: share of the bandwidth of a copy"
        lines.append(Target(what, wanted, partial(aggregation_of_copy, form, sizes, device)))
    for which, wanted in (("forward", 5.0), ("backward", 10.0)):
        what = f"aggregation, v2, {which}: the authors' time over ours, least of N = {sizes.official_tokens}"
        lines.append(Target(what, wanted, partial(official_over_ours, which, sizes, device, official)))
    mixers: list[tuple[FormLabel, str, tuple[int, ...]]] = [
        ("product", "v1", sizes.product_tokens),
        ("heads", f"v2, {sizes.heads} heads", sizes.heads_tokens),
    ]
    for form, name, tokens in mixers:
        what = f"mixer, {name}, forward and backward: SDPA's best time over ours, least of N = {tokens}"
        lines.append(Target(what, 1.0, partial(attention_over_ours, form, tokens, sizes, device)))
    what = f"training step of {sizes.recipe}: share of 989 TFLOP/s"
    lines.append(Target(what, 0.45, partial(training_mfu, sizes, device)))
    return lines


def verdicts(lines: Sequence[Target], seconds: float) -> Iterator[Verdict]:
    """Yield the verdict of each line in turn; details are printed before it. A failure of the first stops the rest."""
    deadline_s = time.monotonic() + seconds
    is_wrong = False
    for number, line in enumerate(lines):
        begun_s = time.monotonic()
        given = line.what, line.wanted, line.at_least
        if is_wrong:
            yield Verdict(*given, None, False, "a path is wrong, so its speed says nothing")
            continue
        if begun_s > deadline_s:
            yield Verdict(*given, None, False, f"not begun within {seconds:.0f} s")
            continue
        try:
            value, details = line.measure()
        except CannotServeError as error:
            yield Verdict(*given, None, None, str(error), time.monotonic() - begun_s)
            continue
        except (RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Verdict(*given, None, False, reason, time.monotonic() - begun_s)
            is_wrong = number == 0
            continue
        for what, figure in details.items():
            print(f"        {what}: {figure:.4g}" if isinstance(figure, float) else f"        {what}: {figure}")
        passed = value >= line.wanted if line.at_least else value <= line.wanted
        is_wrong = number == 0 and not passed
        yield Verdict(*given, value, passed, seconds=time.monotonic() - begun_s, details=details)
