"""The check that comes before every figure: outputs and gradients of a small case against the oracle in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomscale.benchmarks.operators.cases import DTYPES, Case, DtypeLabel
from pomscale.benchmarks.operators.contenders import Contender
from pomscale.benchmarks.operators.entries import Entry
from pomscale.ops.pom.dispatch import CannotServeError

# Largest relative error in the norm of a tensor.
TOLERANCES: dict[DtypeLabel, float] = {"fp64": 1e-11, "fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Check:
    """What the comparison gave: the largest error and the tensor that has it, or why there is none.

    Attributes:
        error: Largest relative error; None = nothing was compared.
        where: Name of the tensor with that error.
        refused: Reason why the contender does not serve the case, or None.
        crashed: Message of an error that it raised, or None.
        tolerance: Largest error that passes.
    """

    error: float | None = None
    where: str = ""
    refused: str | None = None
    crashed: str | None = None
    tolerance: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the contender is wrong: it crashed, or its error is too large or not a number."""
        return self.crashed is not None or (self.error is not None and not self.error <= self.tolerance)

    @property
    def passed(self) -> bool:
        """Whether it may be measured."""
        return self.refused is None and not self.failed

    def __str__(self) -> str:
        if self.refused is not None:
            return f"left out: {self.refused}"
        if self.crashed is not None:
            return f"FAILED: {self.crashed}"
        relation = "above" if self.failed else "within"
        verdict = "FAILED: " if self.failed else ""
        return f"{verdict}error {self.error:.1e} of {self.where}, {relation} {self.tolerance:.0e}"


def check(contender: Contender, case: Case, device: torch.device) -> Check:
    """Compare a contender with the oracle at exactly the given case.

    Left out is alone what raises CannotServeError. Layers refuse operands with a ValueError, and a sweep has only cases
    that fit (`Sweep.cases`), so one is a fault.
    """
    try:
        entry = contender.build(case, device)
        x = case.make_input(device)
        found = _outputs_and_gradients(entry, x, dtype=DTYPES[case.dtype])
    except CannotServeError as error:
        return Check(refused=str(error))
    except (RuntimeError, ValueError) as error:
        return Check(crashed=_line(error))
    expected = _outputs_and_gradients(entry.oracle(), x.double(), dtype=torch.float64)
    if missing := expected.keys() ^ found.keys():
        return Check(crashed=f"no gradient on one of the sides: {sorted(missing)}")
    errors = {name: _error(found[name], expected[name]) for name in expected}
    # A NaN compares as smaller than all, and would hide.
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return Check(errors[worst], worst, tolerance=max(TOLERANCES[case.dtype], entry.own_error))


def _outputs_and_gradients(entry: Entry, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    outputs = as_tuple(entry(x))
    # The same gradients for the layer and its oracle, whatever the dtype.
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, torch.bfloat16).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    assert x.grad is not None
    named = {f"output {number}": y.detach() for number, y in enumerate(outputs)}
    return {**named, "gradient of x": x.grad, **{f"gradient of {n}": g for n, g in entry.gradients().items()}}


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or more outputs as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
