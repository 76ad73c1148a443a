"""The mixer's equations as one would write them for torch.compile: the rival that takes no thought."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.layers import PoM
from pomscale.ops.pom.rotary import cos_sin, rotate
from pomscale.ops.pom.state import accumulation_dtype


def plain_mixer(
    layer: PoM, x: Tensor, takes_part: Tensor | Literal["causal"] | None, positions: Tensor | None
) -> Tensor:
    """Mix x (b n d) with itself.

    Args:
        layer: Weights and form.
        x: Tokens.
        takes_part: None = all tokens, bool (b n) or (b n n), or "causal".
        positions: (n axes), with rope alone.
    """
    features, gates = _features(layer, layer.projection(x), positions), _gates(layer, layer.gate(x), positions)
    mean = _mean(features, takes_part)
    heads = gates.shape[-1]
    mixed = gates[..., None] * mean.unflatten(-1, (heads, -1))
    return layer.output(mixed.flatten(-2))


def _features(layer: PoM, u: Tensor, positions: Tensor | None) -> Tensor:
    if layer.coefficients is None:
        parts = list(F.gelu(u).chunk(layer.form.degree, dim=-1))
        for number in range(1, len(parts)):
            parts[number] = parts[number] * parts[number - 1]
        return torch.cat(parts, dim=-1)
    v = F.leaky_relu(u, 0.01).clamp(-0.1, 6.0)
    powers = torch.stack([v**power for power in range(1, layer.form.degree + 1)], dim=-1)
    h = (powers * layer.coefficients).sum(-1)
    if positions is None:
        return h
    assert layer.form.rope is not None
    return rotate(h, cos_sin(positions, h.shape[-1], layer.form.rope))


def _gates(layer: PoM, logits: Tensor, positions: Tensor | None) -> Tensor:
    if layer.coefficients is None:
        return torch.sigmoid(logits)
    gates = F.hardsigmoid(logits)
    if positions is None:
        return gates
    assert layer.form.rope is not None
    head_width = None if layer.form.heads == 1 else layer.coefficients.shape[0] // layer.form.heads
    return rotate(gates, cos_sin(positions, gates.shape[-1], layer.form.rope, head_width=head_width))


def _mean(features: Tensor, takes_part: Tensor | Literal["causal"] | None) -> Tensor:
    """Return H (b 1 W) or (b n W)."""
    dtype = accumulation_dtype(features.dtype)
    if takes_part is None:
        return features.mean(1, keepdim=True, dtype=dtype).to(features.dtype)
    if isinstance(takes_part, str):
        counts = torch.arange(1, features.shape[1] + 1, device=features.device)[:, None]
        return (features.cumsum(1, dtype=dtype) / counts).to(features.dtype)
    if takes_part.dim() == 2:
        sums = (features * takes_part[..., None]).sum(1, keepdim=True, dtype=dtype)
        return (sums / takes_part.sum(1)[:, None, None]).to(features.dtype)
    return takes_part.to(features.dtype) @ features / takes_part.sum(2, keepdim=True)
