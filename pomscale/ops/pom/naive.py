"""Reference: PoM as the equations state it, slow and dense, in the dtype of its sums. Tests hold other paths to it.

Product form (PoM v1, arXiv 2411.12663, section 3), with a = GELU(u) cut into k pieces a_1 .. a_k along the channels:

    h_m(n) = a_1(n) o a_2(n) o ... o a_m(n),        h(n) = [h_1(n); ...; h_k(n)],        s(i) = sigmoid(gate(i))

Coefficient form (PoM v2, arXiv 2604.06129), with v = clamp(leaky_relu(u, 0.01), -0.1, 6) and R(p) the rotation of
positions p (`rotary.py`), the identity without rope:

    h(n) = R(p_n) sum_m c_m o v(n)^m,               s(i) = R(p_i) hardsigmoid(gate(i)), one value for all of a head

Both:

    H(i) = sum_n mask(i, n) h(n) / sum_n mask(i, n)        (0 where the mask row is empty)
    y(i) = s(i) o H(i), times output^T if the operands have it
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.masks import Mask, dense_mask
from pomscale.ops.pom.operands import Context, Queries
from pomscale.ops.pom.rotary import cos_sin
from pomscale.ops.pom.state import PomState, accumulation_dtype


def polynomial_mixer(context: Context, queries: Queries, mask: Mask) -> Tensor:
    """Mix -> (b m W), or (b m d) with an output map."""
    dtype, (context, queries) = queries.gate.dtype, _exact(context, queries)
    u = context.u
    nothing = PomState.zeros(u.shape[0], context.num_features, u.dtype, u.device)
    return _read(context, queries, mask, nothing).to(dtype)


def polynomial_mixer_step(context: Context, queries: Queries, past: PomState, mask: Mask) -> tuple[Tensor, PomState]:
    """Mix one chunk after the tokens of `past`, and return the state after it."""
    dtype, (context, queries) = queries.gate.dtype, _exact(context, queries)
    batch, num_tokens, _ = context.u.shape
    # The state after the chunk is what a query that follows the whole chunk would read.
    takes_part = dense_mask(mask, batch, num_tokens, num_tokens, context.u.device)[:, -1, :]
    new_sum = past.sum + torch.einsum("bn,bnc->bc", takes_part.to(context.u.dtype), _features(context))
    return _read(context, queries, mask, past).to(dtype), PomState(new_sum, past.count + takes_part.sum(1))


def _exact(context: Context, queries: Queries) -> tuple[Context, Queries]:
    """Convert to the dtype of sums: fp32, or float64 for float64."""
    dtype = accumulation_dtype(context.u.dtype)
    weights = [None if weight is None else weight.to(dtype) for weight in (context.coefficients, queries.output)]
    return (
        replace(context, u=context.u.to(dtype), coefficients=weights[0]),
        replace(queries, gate=queries.gate.to(dtype), output=weights[1]),
    )


def _features(context: Context) -> Tensor:
    degree = context.form.degree
    if context.coefficients is None:
        a = F.gelu(context.u).chunk(degree, dim=-1)
        return torch.cat([math.prod(a[1:m], start=a[0]) for m in range(1, degree + 1)], dim=-1)
    v = F.leaky_relu(context.u, 0.01).clamp(-0.1, 6.0)
    powers = torch.stack([v**m for m in range(1, degree + 1)], dim=-1)
    return _rotated((powers * context.coefficients).sum(-1), context, context.positions)


def _gates(context: Context, queries: Queries) -> Tensor:
    if context.form.name == "product":
        return torch.sigmoid(queries.gate)
    head_width = None if context.form.heads == 1 else context.num_features // context.form.heads
    gates = _rotated(F.hardsigmoid(queries.gate), context, queries.positions, head_width)
    return gates.repeat_interleave(context.num_features // gates.shape[2], dim=2)


def _rotated(x: Tensor, context: Context, positions: Tensor | None, head_width: int | None = None) -> Tensor:
    """Turn pairs of channels as complex numbers, pair by pair."""
    if context.form.rope is None:
        return x
    assert positions is not None
    channels, start = list(x.unbind(2)), 0
    for cos, sin in cos_sin(positions, x.shape[2], context.form.rope, head_width=head_width):
        num_pairs = cos.shape[-1]
        for first in range(start, start + num_pairs):
            angle = torch.complex(cos[..., first - start].to(x.dtype), sin[..., first - start].to(x.dtype))
            turned = torch.complex(channels[first], channels[first + num_pairs]) * angle
            channels[first], channels[first + num_pairs] = turned.real, turned.imag
        start += 2 * num_pairs
    return torch.stack(channels, dim=2)


def _read(context: Context, queries: Queries, mask: Mask, past: PomState) -> Tensor:
    features, gates = _features(context), _gates(context, queries)
    takes_part = dense_mask(mask, features.shape[0], gates.shape[1], features.shape[1], features.device)
    sums = past.sum[:, None] + torch.einsum("bmn,bnc->bmc", takes_part.to(features.dtype), features)
    counts = past.count[:, None] + takes_part.sum(2)
    mean = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], 0)
    y = gates * mean
    return y if queries.output is None else y @ queries.output.T
