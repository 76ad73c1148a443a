"""Time and memory of the whole mixer as one function, beside its bare matrix products and the layered form.

    OMP_NUM_THREADS=2 python -m pomscale.benchmarks.whole_mixer            # all cases, minutes
    OMP_NUM_THREADS=2 python -m pomscale.benchmarks.whole_mixer causal     # cases whose name begins so

Times are of the processor, the minimum of interleaved repeats, over those of the bare products: the linear maps of the
mixer, with their results allocated, and with gradients of all weights and of x. Memory is the peak of new tensors, in
units of one pre-activation (N kD), the gradients of the weights included. Each case is checked against the layered form
before it is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.layers import PoM
from pomscale.ops.pom import BlockCausal, Mask

Pass = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One mixer on one sequence. `mixer` are arguments of PoM beside the width."""

    name: str
    num_tokens: int
    dim: int = 1152
    mask: Mask = None
    mixer: dict[str, Any] = field(default_factory=dict)
    batch: int = 1


CASES = [
    Case("none, N=1024", 1024),
    Case("none, N=4096", 4096),
    Case("causal, N=3600", 3600, mask="causal"),
    Case("block-causal, N=3600, frames of 360", 3600, mask=BlockCausal(360)),
    Case("v2, 16 heads, N=1024", 1024, mixer={"form": "coefficients", "heads": 16}),
]
MEMORY_CASE = Case("memory, N=8192", 8192, dim=288)


def _mixer(case: Case) -> PoM:
    torch.manual_seed(0)
    return PoM(case.dim, **case.mixer)


def _tokens(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(case.batch, case.num_tokens, case.dim, generator=generator) for _ in range(2))
    return x.requires_grad_(), dy


def _layered(mixer: PoM) -> PoM:
    """Make a mixer take the layered path, by a hook that does nothing."""
    mixer.projection.register_forward_pre_hook(lambda *_: None)
    return mixer


def bare_products(mixer: PoM, x: Tensor, dy: Tensor, *, backward: bool) -> Pass:
    """Return the nominal matrix products of the mixer alone: three maps, and twice as many for the gradients."""
    x, dy = x.detach().flatten(0, 1), dy.flatten(0, 1)
    maps = [(m.weight.detach(), m.bias) for m in (mixer.projection, mixer.gate, mixer.output)]
    (projection, b0), (gate, b1), (output, b2) = ((w, None if b is None else b.detach()) for w, b in maps)
    if gate.shape[0] != output.shape[1]:  # gates of heads: their map costs next to nothing
        gate, b1 = gate[:1], b1[:1] if b1 is not None else None

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(rows, weight, bias)

    @torch.no_grad()
    def run() -> Any:
        u, g = linear(x, projection, b0), linear(x, gate, b1)
        y = linear(u, output, b2)
        if not backward:
            return y, g
        ds = dy @ output
        weights = [dy.t() @ u, ds.t() @ x, g.t() @ x]
        dx = g @ gate
        dx.addmm_(ds, projection)
        return y, weights, dx

    return run


def mixer_pass(mixer: PoM, x: Tensor, dy: Tensor, mask: Mask, *, backward: bool) -> Pass:
    """Return the forward pass without gradients, or forward and backward pass."""

    def forward() -> Tensor:
        with torch.no_grad():
            return mixer(x, mask=mask)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(x, mask=mask), [x, *mixer.parameters()], dy)

    return both if backward else forward


def interleaved(passes: dict[str, Pass], repeats: int) -> dict[str, float]:
    """Return the least processor time of each pass, in seconds, over repeats in turn."""
    least = dict.fromkeys(passes, float("inf"))
    for run in passes.values():
        run()
    for _ in range(repeats):
        for name, run in passes.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def _mixers(case: Case) -> dict[str, PoM]:
    fast, lean, layered = _mixer(case), _mixer(case), _layered(_mixer(case))
    lean.mixer_memory = "lean"
    return {"fast": fast, "lean": lean, "layered": layered}


def check(case: Case) -> None:
    """Raise AssertionError unless all forms of the mixer agree, in outputs and gradients."""
    x, dy = _tokens(case)
    found = {}
    for name, mixer in _mixers(case).items():
        y = mixer(x, mask=case.mask)
        found[name] = [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], dy)]
    for name in ("fast", "lean"):
        for ours, theirs in zip(found[name], found["layered"], strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            # Gradients of biases of the context's map are sums that nearly cancel.
            assert error < 2e-4, f"{case.name}, {name}: off by {error:.0e}"


def measure_time(case: Case, repeats: int = 9) -> dict[str, dict[str, float]]:
    """Return {pass: {form: processor time over that of the bare products}}."""
    check(case)
    (x, dy), mixers = _tokens(case), _mixers(case)
    result = {}
    for backward in (False, True):
        passes = {"bare": bare_products(mixers["fast"], x, dy, backward=backward)}
        passes |= {n: mixer_pass(m, x, dy, case.mask, backward=backward) for n, m in mixers.items()}
        least = interleaved(passes, repeats)
        result["f+b" if backward else "f"] = {n: least[n] / least["bare"] for n in mixers}
    return result


def measure_memory(case: Case = MEMORY_CASE) -> dict[str, dict[str, float]]:
    """Return {pass: {form: peak of new tensors in units of one pre-activation}}."""
    (x, dy), result = _tokens(case), {}
    for backward in (False, True):
        peaks = {}
        for name, mixer in _mixers(case).items():
            run = mixer_pass(mixer, x, dy, case.mask, backward=backward)
            unit = case.batch * case.num_tokens * mixer.projection.weight.shape[0] * x.element_size()
            with StorageTracker([x, dy, *mixer.parameters()]) as tracker:
                before = tracker.live
                kept = run()
            peaks[name] = (tracker.peak - before) / unit
            del kept
        result["f+b" if backward else "f"] = peaks
    return result


def main(prefixes: list[str]) -> None:
    """Print the cases whose names begin with one of the prefixes, by default all."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for case in [*CASES, MEMORY_CASE]:
        if prefixes and not any(case.name.startswith(prefix) for prefix in prefixes):
            continue
        found = measure_memory(case) if case is MEMORY_CASE else measure_time(case)
        for name, row in found.items():
            print(f"{case.name:38} {name:4}", *(f"{form} {value:.3f}" for form, value in row.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
