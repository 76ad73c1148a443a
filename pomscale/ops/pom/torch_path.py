"""The operator in plain PyTorch, differentiated by autograd: each product once, sums in fp32, no n x n for any order.

Shapes: b samples, m queries, n context tokens, k degree, D width of one piece, K frame length, f frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.masks import BlockCausal, Mask
from pomscale.ops.pom.state import PomState, StateReduce, accumulation_dtype


def polynomial_mixer(u: Tensor, gate: Tensor, degree: int, mask: Mask, state_reduce: StateReduce | None) -> Tensor:
    """Mix u (b n kD) by gate (b m kD) -> y (b m kD) in the dtype of `gate`."""
    if isinstance(mask, BlockCausal):
        return _block_causal(u, gate, degree, mask.frame_length)
    if isinstance(mask, str):
        nothing = PomState.zeros(u.shape[0], u.shape[2], u.dtype, u.device)
        return _causal(u, gate, degree, nothing)[0]
    if mask is not None and mask.dim() == 3:
        return _any_pattern(u, gate, degree, mask)
    state = _aggregate(u, degree, mask)
    if state_reduce is not None:
        state = state_reduce(state)
    return _select(gate, state.mean()[:, None])


def polynomial_mixer_step(u: Tensor, gate: Tensor, degree: int, past: PomState, mask: Mask) -> tuple[Tensor, PomState]:
    """Mix one chunk after the tokens of `past`: u, gate (b n kD) -> y (b n kD) and the state after the chunk."""
    if isinstance(mask, str):
        return _causal(u, gate, degree, past)
    assert not isinstance(mask, BlockCausal)
    state = past + _aggregate(u, degree, mask)
    return _select(gate, state.mean()[:, None]), state


def _products(u: Tensor, degree: int) -> list[Tensor]:
    """Return the k cumulative products of the pieces of GELU(u), each (b n D)."""
    pieces = F.gelu(u).chunk(degree, dim=-1)
    products = [pieces[0]]
    for piece in pieces[1:]:
        products.append(products[-1] * piece)
    return products


def _without(u: Tensor, takes_part: Tensor) -> Tensor:
    """Set u to 0 at tokens outside `takes_part` (b n); GELU(0) = 0, so all their monomials vanish.

    Filling rather than multiplying keeps a NaN in a padded token out of the sums and out of the gradients.
    """
    return u.masked_fill(~takes_part[..., None], 0.0)


def _select(gate: Tensor, mean: Tensor) -> Tensor:
    """Return sigmoid(gate) o H. H stays fp32 up to here; only what is broadcast over the queries is rounded."""
    return torch.sigmoid(gate) * mean.to(gate.dtype)


def _aggregate(u: Tensor, degree: int, mask: Tensor | None) -> PomState:
    batch, num_tokens, _ = u.shape
    if mask is None:
        count = torch.full((batch,), num_tokens, dtype=torch.int64, device=u.device)
    else:
        u, count = _without(u, mask), mask.sum(1)
    dtype = accumulation_dtype(u.dtype)
    # The pieces are joined after the reduction, when they are k vectors instead of k sequences.
    return PomState(torch.cat([product.sum(1, dtype=dtype) for product in _products(u, degree)], dim=-1), count)


def _any_pattern(u: Tensor, gate: Tensor, degree: int, mask: Tensor) -> Tensor:
    """Mix under a mask (b m n), dense in m x n as the caller's mask already is."""
    dtype = accumulation_dtype(u.dtype)
    products = _products(_without(u, mask.any(1)), degree)
    with torch.autocast(u.device.type, enabled=False):  # autocast would round the fp32 operands to bf16
        sums = torch.cat([mask.to(dtype) @ product.to(dtype) for product in products], dim=-1)
    return _select(gate, sums / mask.sum(2, keepdim=True).clamp(min=1))


def _causal(u: Tensor, gate: Tensor, degree: int, past: PomState) -> tuple[Tensor, PomState]:
    num_tokens, dtype = u.shape[1], accumulation_dtype(u.dtype)
    sums = torch.cat([product.cumsum(1, dtype=dtype) for product in _products(u, degree)], dim=-1)
    sums = sums + past.sum[:, None]
    counts = past.count[:, None] + torch.arange(1, num_tokens + 1, device=u.device)
    # This is a copy, since a view of the last row would keep all n rows alive for as long as the state is carried.
    state = PomState(sums[:, -1].clone(), past.count + num_tokens)
    return _select(gate, sums / counts[..., None]), state


def _frames(x: Tensor, frame_length: int) -> list[Tensor]:
    """View x (b n c) as whole frames (b f K c) and, if K does not divide n, the last one (b 1 n%K c)."""
    num_whole, rest = x.shape[1] // frame_length, x.shape[1] % frame_length  # torch.compile cannot trace divmod
    whole = x[:, : x.shape[1] - rest].unflatten(1, (num_whole, frame_length))
    return [whole, x[:, -rest:].unsqueeze(1)] if rest else [whole]


def _block_causal(u: Tensor, gate: Tensor, degree: int, frame_length: int) -> Tensor:
    """Mix block-causally: S_f = sum of h over frame f; H_f = (S_1 + .. + S_f) / (tokens up to the end of frame f)."""
    num_tokens, dtype = u.shape[1], accumulation_dtype(u.dtype)
    frame_sums = torch.cat(
        [
            torch.cat([frames.sum(2, dtype=dtype) for frames in _frames(product, frame_length)], dim=1)
            for product in _products(u, degree)
        ],
        dim=-1,
    )  # (b f kD)
    frame_ends = torch.arange(1, frame_sums.shape[1] + 1, device=u.device) * frame_length
    means = frame_sums.cumsum(1) / frame_ends.clamp(max=num_tokens)[:, None]

    gates = _frames(gate, frame_length)
    means_of = means[:, :, None].split([frames.shape[1] for frames in gates], dim=1)
    outputs = [_select(frames, mean).flatten(1, 2) for frames, mean in zip(gates, means_of, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
