"""Modulation and gates of packed tokens: vectors of units, each of which is for a run of neighbouring tokens.

Samples of several lengths lie one after another in one sequence (1 N d), and a unit is what shares a condition: a
sample, or a frame group with a time of its own. No vector of a unit is copied to its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_MOST_RUNS = 16
"""Runs up to which a GPU is given operators run by run; vectors of more of them are gathered, as of texts."""


@dataclass(frozen=True)
class Run:
    """Units of one length that lie next to each other: tokens start .. stop - 1, evenly of units first .. last - 1."""

    start: int
    stop: int
    first: int
    last: int

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the run's tokens (units n d) of x (1 N d), a view."""
        return x[0, self.start : self.stop].unflatten(0, (self.last - self.first, -1))

    def of_units(self, vectors: Tensor) -> Tensor:
        """Return the run's vectors (units 1 d) of those of all units (1 U d), a view."""
        return vectors[0, self.first : self.last, None]


@dataclass(frozen=True)
class Units:
    """Units of packed tokens, in order. lengths: tokens of each."""

    lengths: tuple[int, ...]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of units of one length, those without tokens left out."""
        found, start, first = [], 0, 0
        for length, equal in groupby(self.lengths):
            last = first + len(list(equal))
            stop = start + length * (last - first)
            if length:
                found.append(Run(start, stop, first, last))
            start, first = stop, last
        return tuple(found)

    @property
    def num_tokens(self) -> int:
        """Tokens of all units."""
        return sum(self.lengths)

    def unit_of_tokens(self, device: torch.device) -> Tensor:
        """Return the unit of each token, (N,) int64."""
        numbers = torch.arange(len(self.lengths), device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return numbers.repeat_interleave(lengths, output_size=self.num_tokens)


def modulate_units(x: Tensor, shift: Tensor, scale: Tensor, units: Units) -> Tensor:
    """Return x (1 + scale) + shift for packed tokens x (1 N d); shift and scale (1 U d) are those of the units."""
    return _apply(x, 1 + scale, shift, units)


def gate_units(gate: Tensor, x: Tensor, units: Units) -> Tensor:
    """Return gate x for packed tokens x (1 N d) and gates (1 U d) of the units."""
    return _apply(x, gate, None, units)


def _apply(x: Tensor, scale: Tensor, shift: Tensor | None, units: Units) -> Tensor:
    y: Tensor = _Scaled.apply(x, scale, shift, units)
    return y


def _gathers(x: Tensor, units: Units) -> bool:
    """Decide between vectors that are gathered to tokens, which a CPU does slowly, and operators run by run."""
    return x.device.type != "cpu" and len(units.runs) > _MOST_RUNS


class _Scaled(torch.autograd.Function):
    """x scale + shift by unit, which keeps x and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, units: Units) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.units = units
        if _gathers(x, units):
            of_token = units.unit_of_tokens(x.device)
            y = x * scale[:, of_token]
            return y if shift is None else y.add_(shift[:, of_token])
        y = torch.empty_like(x)
        for run in units.runs:
            tokens, factors, out = run.of_tokens(x), run.of_units(scale), run.of_tokens(y)
            if shift is None:
                torch.mul(tokens, factors, out=out)
            else:
                torch.addcmul(run.of_units(shift), tokens, factors, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, scale), units, (of_x, of_scale, of_shift, _) = ctx.saved_tensors, ctx.units, ctx.needs_input_grad
        dx = None
        if of_x and _gathers(dy, units):
            dx = dy * scale[:, units.unit_of_tokens(dy.device)]
        elif of_x:
            dx = torch.empty_like(dy)
            for run in units.runs:
                torch.mul(run.of_tokens(dy), run.of_units(scale), out=run.of_tokens(dx))
        dscale = _sums(dy, units, x) if of_scale else None
        return dx, dscale, _sums(dy, units) if of_shift else None, None


def _sums(dy: Tensor, units: Units, x: Tensor | None = None) -> Tensor:
    """Return the sums of dy (1 N d), or of dy x, over the tokens of each unit, (1 U d); always in the same order."""
    if _gathers(dy, units):
        products = dy[0] if x is None else dy[0] * x[0]
        lengths = torch.tensor(units.lengths, device=dy.device)
        return torch.segment_reduce(products, "sum", lengths=lengths, axis=0, unsafe=True)[None]
    sums = dy.new_zeros(1, len(units.lengths), dy.shape[2])
    for run in units.runs:
        gradient = run.of_tokens(dy)
        gradient = gradient if x is None else gradient * run.of_tokens(x)
        torch.sum(gradient, dim=1, keepdim=True, out=run.of_units(sums))
    return sums
