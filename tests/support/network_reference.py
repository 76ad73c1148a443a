"""Parts of networks written out with dense masks, for one sample without padding, as references of the real ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.layers import Attention, GroupedLinear, PoM, RMSNorm, SwiGLU
from pomscale.ops.pom.rotary import num_pairs


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear | GroupedLinear)
    groups = layer.groups if isinstance(layer, GroupedLinear) else 1
    weight = torch.block_diag(*layer.weight.chunk(groups))
    y = torch.einsum("...i,oi->...o", x, weight)
    return y if layer.bias is None else y + layer.bias


def feed_forward(ffn: nn.Module, x: Tensor) -> Tensor:
    if isinstance(ffn, SwiGLU):
        gate, value = linear(ffn.expand, x).chunk(2, -1)
        return linear(ffn.contract, gate * gate.sigmoid() * value)
    assert isinstance(ffn, nn.Sequential)
    return linear(ffn[2], F.gelu(linear(ffn[0], x)))


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def moved(norm: nn.Module, x: Tensor, modulation: tuple[Tensor, ...], first: int) -> Tensor:
    return normed(norm, x) * (1 + modulation[first]) + modulation[first + 1]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Turn x (n W) by positions (n axes), channel c with c + P of the block of an axis, by position 10000^(-c/P).

    The angles are fp32 in any precision, as the operator has them.
    """
    blocks = []
    axes: Any = positions.shape[1]
    all_pairs = num_pairs(x.shape[1], axes)
    parts = x.split([2 * pairs for pairs in all_pairs], 1)
    for position, pairs, block in zip(positions.T, all_pairs, parts, strict=True):
        angle = position[:, None] * (1 / 10_000.0 ** (torch.arange(pairs) / pairs))
        turned = torch.complex(*block.double().chunk(2, 1)) * torch.complex(angle.cos(), angle.sin())
        blocks.append(torch.cat([turned.real, turned.imag], 1))
    return torch.cat(blocks, 1).to(x.dtype)


def mix(
    mixer: nn.Module, queries: Tensor, context: Tensor, readable: Tensor, positions: Tensor | None = None
) -> Tensor:
    """queries (m d), context (n d), readable (m n), positions (n axes) of queries and context alike -> (m d)."""
    assert isinstance(mixer, Attention | PoM)
    if isinstance(mixer, Attention):
        query = linear(mixer.query, queries).chunk(mixer.num_heads, -1)
        key, value = (x.chunk(mixer.num_heads, -1) for x in linear(mixer.key_value, context).chunk(2, -1))
        heads = []
        for q, k, v in zip(query, key, value, strict=True):
            scores = head(mixer, mixer.query_norm, q, positions) @ head(mixer, mixer.key_norm, k, positions).T
            heads.append((scores / math.sqrt(q.shape[-1])).masked_fill(~readable, -torch.inf).softmax(-1) @ v)
        return linear(mixer.output, torch.cat(heads, -1))
    if mixer.coefficients is None:
        first, second = F.gelu(linear(mixer.projection, context)).chunk(2, -1)
        monomials, gates = torch.cat([first, first * second], -1), torch.sigmoid(linear(mixer.gate, queries))
    else:
        v = F.leaky_relu(linear(mixer.projection, context), 0.01).clamp(-0.1, 6)
        monomials = sum(c * v**m for m, c in enumerate(mixer.coefficients.T, start=1))
        gates = F.hardsigmoid(linear(mixer.gate, queries))
        if positions is not None:
            monomials, gates = rotated(monomials, positions), rotated(gates, positions)
        gates = gates.repeat_interleave(monomials.shape[1] // gates.shape[1], 1)
    takes_part = readable.to(monomials.dtype)
    mean = torch.einsum("mn,nc->mc", takes_part, monomials) / takes_part.sum(1, keepdim=True)
    return linear(mixer.output, gates * mean)


def head(mixer: Attention, norm: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the query or key of a head as it is compared."""
    x = normed(norm, x) if isinstance(norm, RMSNorm) else x
    return x if mixer.rope is None or positions is None else rotated(x, positions)
