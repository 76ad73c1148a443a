"""`pomscale bench ops --figures`: the figures that the mixer is held to, each beside its rival and its target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pomscale.benchmarks.memory import peak_allocated_bytes
from pomscale.benchmarks.operators.cases import Case
from pomscale.benchmarks.operators.contenders import FLOOR, LAYERED, LEAN, OFFICIAL, OURS, contenders
from pomscale.benchmarks.operators.entries import layered
from pomscale.benchmarks.operators.gate import TOLERANCES
from pomscale.benchmarks.operators.measurer import PASSES, Measurer, Pass, Row, never_silently_eager
from pomscale.benchmarks.operators.official import Official
from pomscale.benchmarks.operators.sweep import add_rows
from pomscale.benchmarks.operators.timing import take_turns
from pomscale.benchmarks.report import BenchReport
from pomscale.layers import PoM
from pomscale.models import build_model
from pomscale.ops.pom import Context, Mask, Queries, naive, polynomial_mixer

_Rows = dict[str, Row]


def bench_figures(official: Official, device: torch.device, *, num_turns: int, out: Path | None) -> BenchReport:
    """Measure the figures of width 1152, expand 2, degree 2 in fp32, and compare them with their targets.

    Args:
        official: The authors' layers that are at hand.
        device: Device to measure; the targets are those of a CPU.
        num_turns: Turns of each contender; the least time counts.
        out: JSON that is written again after each part.
    """
    report = BenchReport("operators, figures")
    names = (FLOOR, OURS, LEAN, LAYERED, OFFICIAL)
    chosen = [one for one in contenders(official, device, with_compiled=False) if one.name in names]
    measurer = Measurer(chosen, device, num_turns)

    def measure(case: Case) -> _Rows:
        rows = measurer.measure(case)
        add_rows(report, case, rows)
        return {row.contender: row for row in rows}

    parts: list[Callable[[], None]] = [
        partial(_product, report, measure),
        partial(_causal, report, measure),
        partial(_block_causal_operator, report, device, num_turns),
        partial(_heads, report, measure),
        partial(_memory, report, measure),
        partial(_step, report, device, num_turns),
    ]
    with never_silently_eager():
        for part in parts:
            part()
            if out is not None:
                report.save(out)
    return report


def _product(report: BenchReport, measure: Callable[[Case], _Rows]) -> None:
    for num_tokens, most in ((256, None), (1024, 0.041), (4096, 0.08)):
        rows = measure(Case(num_tokens))
        if most is not None:
            for one in PASSES:
                _between(report, f"v1, N = {num_tokens}", rows, one, most)


def _causal(report: BenchReport, measure: Callable[[Case], _Rows]) -> None:
    rows = measure(Case(3600, mask="causal"))
    _between(report, "v1 causal, N = 3600", rows, "forward", 0.20)
    _between(report, "v1 causal, N = 3600", rows, "training", 0.20)
    rows = measure(Case(3600, mask="block-causal"))
    _between(report, "v1 block-causal, N = 3600, frames of 360", rows, "forward", 0.08)
    _between(report, "v1 block-causal, N = 3600, frames of 360", rows, "training", 0.10)


def _between(report: BenchReport, what: str, rows: _Rows, one: Pass, most: float) -> None:
    if one in rows[OURS].over_floor:
        share = rows[OURS].over_floor[one] - 1
        report.compare(f"{what}, {one}: between the GEMMs, over them", share, most, at_least=False)


def _block_causal_operator(report: BenchReport, device: torch.device, num_turns: int) -> None:
    """Compare the operator alone with the einsum over a dense mask, which is how the oracle and the authors have it."""
    case = Case(3600, mask="block-causal")
    steps = operator_steps(case, case.make_mask(device), device)
    ours, einsum = (steps[name, "training"]() for name in ("ours", "einsum"))
    error = float((ours - einsum).norm() / einsum.norm())
    if not error < TOLERANCES[case.dtype]:
        report.failures.append(f"{case}, operator alone: error {error:.1e} of the output")
    times = take_turns(steps, device, num_turns)
    for one in PASSES:
        ours_s, einsum_s = times["ours", one].busy_s, times["einsum", one].busy_s
        report.add(f"{case}, operator alone, {one}", ours_s=ours_s, einsum_s=einsum_s)
        report.compare(f"block-causal operator over the einsum, {one}", einsum_s / ours_s, 12)


def operator_steps(case: Case, mask: Mask, device: torch.device) -> dict[tuple[str, Pass], Callable[[], Tensor]]:
    """Return forward, and forward with backward, of the operator and of the oracle's einsum on the same operands."""
    form = case.make_layer().form
    u, gate, grad = torch.randn(3, case.batch, case.num_tokens, case.num_channels, device=device)
    steps: dict[tuple[str, Pass], Callable[[], Tensor]] = {}
    for name, operator in (("ours", polynomial_mixer), ("einsum", naive.polynomial_mixer)):

        def forward(operator: Callable[..., Tensor] = operator) -> Tensor:
            with torch.no_grad():
                return operator(Context(u, form), Queries(gate), mask)

        def training(operator: Callable[..., Tensor] = operator) -> Tensor:
            operands = u.detach().requires_grad_(), gate.detach().requires_grad_()
            y = operator(Context(operands[0], form), Queries(operands[1]), mask)
            y.backward(grad)
            return y.detach()

        steps |= {(name, "forward"): forward, (name, "training"): training}
    return steps


def _heads(report: BenchReport, measure: Callable[[Case], _Rows]) -> None:
    peaks = {}
    for degree in (2, 3, 4):
        rows = measure(Case(1024, form="heads", degree=degree))
        peaks[degree] = rows[OURS].peak_units
        if degree == 2 and rows[OURS].over_floor:
            for one, most in zip(PASSES, (0.65, 0.90), strict=True):
                ratio = rows[OURS].over_floor[one]
                report.compare(f"v2, 16 heads, N = 1024, {one}: over the nominal GEMMs", ratio, most, at_least=False)
    for one in PASSES if all(peaks.values()) else ():
        growth = peaks[4][one] / peaks[2][one]
        report.compare(f"v2, {one}: memory of degree 4 over that of degree 2", growth, 1.02, at_least=False)


def _memory(report: BenchReport, measure: Callable[[Case], _Rows]) -> None:
    rows = measure(Case(8192, dim=288))
    for name, targets in ((OURS, (0.45, 2.9)), (LEAN, (0.45, 1.0))):
        for one, most in zip(PASSES, targets, strict=True):
            if one in rows[name].peak_units:
                peak = rows[name].peak_units[one]
                report.compare(f"{name}, {one}: peak in units of N x kD", peak, most, at_least=False)
    if rows[LEAN].times:
        ratio = rows[LEAN].times["training"].busy_s / rows[OURS].times["training"].busy_s
        report.compare("lean over fast, time of forward and backward", ratio, 1.3, at_least=False)


class _LayeredMixer(nn.Module):
    """The mixer of a block, as the operator between linear maps."""

    def __init__(self, layer: PoM) -> None:
        super().__init__()
        self.layer = layer
        self.rope = layer.rope

    def forward(self, x: Tensor, mask: Mask = None, positions: Tensor | None = None, split: None = None) -> Tensor:
        return layered(self.layer, x, mask, positions, "torch")


def _step(report: BenchReport, device: torch.device, num_turns: int, batch: int = 8) -> None:
    """Compare forward and backward of DiPoM-S/2, nothing recomputed by blocks, with the layered form of its mixers."""
    steps = step_of_a_network("dipom-s-2", (4, 32, 32), batch, device)
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak_allocated_bytes(step, device)
    times = take_turns(steps, device, num_turns)
    for name, step_times in times.items():
        figures = {"step_s": step_times.busy_s, "peak_mib": peaks[name] / 2**20}
        report.add(f"DiPoM-S/2, forward and backward, batch {batch}, {name}", **figures)
    for name, most_memory, most_time in ((OURS, 0.76, 1.0), (LEAN, 0.5, 1.1)):
        memory, time = peaks[name] / peaks[LAYERED], times[name].busy_s / times[LAYERED].busy_s
        report.compare(f"DiPoM-S/2, {name}: peak over that of layered mixers", memory, most_memory, at_least=False)
        report.compare(f"DiPoM-S/2, {name}: time over that of layered mixers", time, most_time, at_least=False)


def step_of_a_network(
    preset: str, latent_shape: tuple[int, int, int], batch: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return forward and backward of a network with our mixers, with lean ones, and with layered ones."""
    x, t = torch.randn(batch, *latent_shape, device=device), torch.rand(batch, device=device)
    condition = torch.zeros(batch, dtype=torch.int64, device=device)
    steps: dict[str, Callable[[], None]] = {}
    for name in (OURS, LEAN, LAYERED):
        model = build_model(preset, latent_shape=latent_shape, num_classes=10).to(device)
        for block in model.blocks():
            mixer = block.get_submodule("mixer")
            assert isinstance(mixer, PoM)
            if name == LAYERED:
                block.register_module("mixer", _LayeredMixer(mixer))
            elif name == LEAN:
                mixer.mixer_memory = "lean"

        def step(model: nn.Module = model) -> None:
            model(x, t, condition).square().mean().backward()
            model.zero_grad(set_to_none=True)

        steps[name] = step
    return steps
