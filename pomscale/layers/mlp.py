"""Feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.layers.maps import is_plain, serves_operators

Drop = Callable[[Tensor], Tensor]
"""Dropout of the hidden features."""


class FeedForward(nn.Sequential):
    """Map (.. d) -> (.. d): Linear to `width`, exact GELU, Linear back."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        hidden = self[1](self[0](x))
        return self[2](hidden if drop is None else drop(hidden))


class SwiGLU(nn.Module):
    """Map (.. d) -> (.. d): a, b = Linear to 2 `width`; Linear back of silu(a) o b (Shazeer 2020).

    For the backward pass a and b are kept, and the hidden features silu(a) o b are computed again: they are half of
    what torch would keep. Layered, as written, are: dropout; torch.compile, which decides that itself; and what
    `layers.maps` says of the map back and of x.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * width)
        self.contract = nn.Linear(width, dim)
        self.stacked_maps = {"expand": 2}

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        expanded = self.expand(x)
        if drop is None and not torch.compiler.is_compiling() and serves_operators(x) and is_plain(self.contract):
            y: Tensor = _Contracted.apply(expanded, self.contract.weight, self.contract.bias)
            return y
        gate, value = expanded.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        return self.contract(hidden if drop is None else drop(hidden))


class _Contracted(torch.autograd.Function):
    """Linear map of silu(a) o b for [a b] (.. 2 w), which keeps [a b]."""

    @staticmethod
    def forward(ctx: Any, expanded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(expanded, weight)
        gate, value = expanded.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(value), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        expanded, weight = ctx.saved_tensors
        gate, value = expanded.chunk(2, dim=-1)
        hidden, rows = F.silu(gate), dy.flatten(0, -2)
        dexpanded = dweight = None
        if ctx.needs_input_grad[0]:
            dexpanded, dhidden = torch.empty_like(expanded), dy @ weight
            dgate, dvalue = dexpanded.chunk(2, dim=-1)
            torch.mul(dhidden, hidden, out=dvalue)
            dgate.copy_(torch.ops.aten.silu_backward(dhidden.mul_(value), gate))
            del dhidden
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ hidden.mul_(value).flatten(0, -2)
        return dexpanded, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None
