"""Reference: PoM as the equations state it, slow and dense, in the dtype of its inputs. Tests hold other paths to it.

With a = GELU(u) cut into k pieces a_1 .. a_k along the channels (PoM v1, arXiv 2411.12663, section 3):

    h_m(n) = a_1(n) o a_2(n) o ... o a_m(n),        h(n) = [h_1(n); ...; h_k(n)]
    H(i)   = sum_n mask(i, n) h(n) / sum_n mask(i, n)        (0 where the mask row is empty)
    y(i)   = sigmoid(gate(i)) o H(i)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.masks import Mask, dense_mask
from pomscale.ops.pom.state import PomState


def polynomial_mixer(u: Tensor, gate: Tensor, degree: int, mask: Mask) -> Tensor:
    """Mix u (b n kD) by gate (b m kD) -> y (b m kD)."""
    batch, _, width = u.shape
    nothing = PomState.zeros(batch, width, u.dtype, u.device)
    return _read(u, gate, degree, mask, nothing)


def polynomial_mixer_step(u: Tensor, gate: Tensor, degree: int, past: PomState, mask: Mask) -> tuple[Tensor, PomState]:
    """Mix one chunk after the tokens of `past`: u, gate (b n kD) -> y (b n kD) and the state after the chunk."""
    batch, num_tokens, _ = u.shape
    # The state after the chunk is what a query that follows the whole chunk would read.
    takes_part = dense_mask(mask, batch, num_tokens, num_tokens, u.device)[:, -1, :]
    new_sum = past.sum + torch.einsum("bn,bnc->bc", takes_part.to(u.dtype), _monomials(u, degree))
    return _read(u, gate, degree, mask, past), PomState(new_sum, past.count + takes_part.sum(1))


def _monomials(u: Tensor, degree: int) -> Tensor:
    a = F.gelu(u).chunk(degree, dim=-1)
    return torch.cat([math.prod(a[1:m], start=a[0]) for m in range(1, degree + 1)], dim=-1)


def _read(u: Tensor, gate: Tensor, degree: int, mask: Mask, past: PomState) -> Tensor:
    batch, num_context, _ = u.shape
    takes_part = dense_mask(mask, batch, gate.shape[1], num_context, u.device)
    sums = past.sum[:, None] + torch.einsum("bmn,bnc->bmc", takes_part.to(u.dtype), _monomials(u, degree))
    counts = past.count[:, None] + takes_part.sum(2)
    mean = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], 0)
    return torch.sigmoid(gate) * mean
