"""Root mean square norm (Zhang & Sennrich 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**18
"""Numbers that are computed at a time: they stay in a core's cache."""


class RMSNorm(nn.Module):
    """Map x (.. d) -> w x / sqrt(mean(x^2) + eps) in the dtype of x, computed in fp32, or in fp64 for x in fp64."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # On CPUs torch has no fused operator, and its parts keep two tensors of the size of x.
        normalized: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
        return normalized


class _RmsNorm(torch.autograd.Function):
    """The norm, which keeps x and a number per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        scales = torch.empty((*x.shape[:-1], 1), dtype=_exact(x[:0]).dtype)
        for x_part, y_part, scale in zip(_rows(x), _rows(y), _rows(scales, x.shape[-1]), strict=True):
            exact = _exact(x_part)
            torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps, out=scale)
            y_part.copy_((exact * scale).mul_(weight))
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x s and g = w dy: dw = sum n dy, dx = s (g - n mean(g n))."""
        x, weight, scales = ctx.saved_tensors
        dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros(weight.shape, dtype=scales.dtype)
        parts = (_rows(x), _rows(dy), _rows(dx), _rows(scales, x.shape[-1]))
        for x_part, dy_part, dx_part, scale in zip(*parts, strict=True):
            normalized, gradient = _exact(x_part) * scale, _exact(dy_part)
            dweight += (gradient * normalized).flatten(0, -2).sum(0)
            gradient = gradient * weight
            mean = (gradient * normalized).mean(-1, keepdim=True)
            dx_part.copy_(gradient.sub_(normalized.mul_(mean)).mul_(scale))
        return dx, dweight.to(weight.dtype), None


def _rows(x: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Cut x (.. d) along its tokens into parts of about `_CHUNK` numbers, where `width` stands for d."""
    rows = x.flatten(0, 1) if x.ndim > 2 else x
    of_row = math.prod(rows.shape[1:-1]) * (width or x.shape[-1])
    return rows.split(max(_CHUNK // of_row, 1))


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
