"""The operator in plain PyTorch, differentiated by autograd: each product once, sums in fp32, no n x n for any order.

Shapes: b samples, m queries, n context tokens, k degree, W features, G gates, K frame length, f frames.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.masks import BlockCausal, Mask, Segments
from pomscale.ops.pom.operands import Context, Queries
from pomscale.ops.pom.rotary import cos_sin, rotate
from pomscale.ops.pom.split import TokenSplit, runs_of_frames
from pomscale.ops.pom.state import PomState, accumulation_dtype


def polynomial_mixer(context: Context, queries: Queries, mask: Mask, split: TokenSplit | None) -> Tensor:
    """Mix -> (b m W) or, through the linear map, (b m d), in the dtype of the gates."""
    if isinstance(mask, Segments):
        return _segments(context, queries, mask)
    if isinstance(mask, BlockCausal):
        return _block_causal(context, queries, mask.frame_length, _nothing(context), split)[0]
    if isinstance(mask, str):
        return _causal(context, queries, _nothing(context), split)[0]
    if mask is not None and mask.dim() == 3:
        return _any_pattern(context, queries, mask)
    state = _aggregate(context, mask)
    if split is not None:
        state = split.total(state)
    return select(context, queries, state.mean()[:, None])


def polynomial_mixer_step(context: Context, queries: Queries, past: PomState, mask: Mask) -> tuple[Tensor, PomState]:
    """Mix one chunk after the tokens of `past`, and return the state after it."""
    if isinstance(mask, str):
        return _causal(context, queries, past)
    if isinstance(mask, BlockCausal):
        return _block_causal(context, queries, mask.frame_length, past)
    assert not isinstance(mask, Segments)
    state = past + _aggregate(context, mask)
    return select(context, queries, state.mean()[:, None]), state


def _features(context: Context) -> list[Tensor]:
    """Return the features h as pieces (b n W/pieces), which are joined after a reduction."""
    if context.coefficients is None:
        pieces = F.gelu(context.u).chunk(context.form.degree, dim=-1)
        products = [pieces[0]]
        for piece in pieces[1:]:
            products.append(products[-1] * piece)
        return products
    v = F.leaky_relu(context.u, 0.01).clamp(-0.1, 6.0)
    *lower, highest = context.coefficients.to(v.dtype).unbind(1)
    h = v * highest
    for coefficient in reversed(lower):  # Horner's scheme
        h = (h + coefficient) * v
    if context.form.rope is not None:
        assert context.positions is not None
        h = rotate(h, cos_sin(context.positions, h.shape[2], context.form.rope))
    return [h]


def _gates(context: Context, queries: Queries) -> Tensor:
    """Return s (b m G)."""
    form = context.form
    if form.name == "product":
        return torch.sigmoid(queries.gate)
    gates = F.hardsigmoid(queries.gate)
    if form.rope is not None:
        assert queries.positions is not None
        head_width = None if form.heads == 1 else context.num_features // form.heads
        gates = rotate(gates, cos_sin(queries.positions, gates.shape[2], form.rope, head_width=head_width))
    return gates


def select(context: Context, queries: Queries, mean: Tensor) -> Tensor:
    """Return s o H (b m W), through the output map if there is one, of means (b f W), each read by m/f queries."""
    return _gated(_gates(context, queries), mean, context.form.heads, queries.output)


def _gated(gates: Tensor, mean: Tensor, heads: int, output: Tensor | None) -> Tensor:
    """Apply gates (b m G) to means (b f W) as `select` does."""
    num_frames, output = mean.shape[1], None if output is None else output.to(gates.dtype)
    # H stays fp32 up to here; only what is broadcast over the queries is rounded.
    mean = mean.to(gates.dtype)
    gates = gates.unflatten(1, (num_frames, gates.shape[1] // max(num_frames, 1)))  # (b f m/f G)
    if heads > 1:
        mean = mean.unflatten(2, (heads, -1))
        if output is not None and gates.shape[2] > 1:
            # y_n = sum_h s_nh (Wo_h H_h): the map is applied to the state of each frame and not to each query.
            folded = torch.einsum("bfhc,ohc->bfho", mean, output.unflatten(1, (heads, -1)))
            return (gates @ folded).flatten(1, 2)
        selected = (gates[..., None] * mean[:, :, None]).flatten(3)
    else:
        selected = gates * mean[:, :, None]
    selected = selected.flatten(1, 2)
    return selected if output is None else F.linear(selected, output)


def _nothing(context: Context) -> PomState:
    u = context.u
    return PomState.zeros(u.shape[0], context.num_features, u.dtype, u.device)


def _aggregate(context: Context, mask: Tensor | None) -> PomState:
    batch, num_tokens, _ = context.u.shape
    if mask is None:
        count = torch.full((batch,), num_tokens, dtype=torch.int64, device=context.u.device)
    else:
        context, count = context.without(mask), mask.sum(1)
    dtype = accumulation_dtype(context.u.dtype)
    # The pieces are joined after the reduction, when they are k vectors instead of k sequences.
    return PomState(torch.cat([piece.sum(1, dtype=dtype) for piece in _features(context)], dim=-1), count)


def _any_pattern(context: Context, queries: Queries, mask: Tensor) -> Tensor:
    """Mix under a mask (b m n), dense in m x n as the caller's mask already is."""
    dtype = accumulation_dtype(context.u.dtype)
    pieces = _features(context.without(mask.any(1)))
    with torch.autocast(mask.device.type, enabled=False):  # autocast would round the fp32 operands to bf16
        sums = torch.cat([mask.to(dtype) @ piece.to(dtype) for piece in pieces], dim=-1)
    return select(context, queries, sums / mask.sum(2, keepdim=True).clamp(min=1))


def _causal(
    context: Context, queries: Queries, past: PomState, split: TokenSplit | None = None
) -> tuple[Tensor, PomState]:
    num_tokens, dtype = context.u.shape[1], accumulation_dtype(context.u.dtype)
    sums = torch.cat([piece.cumsum(1, dtype=dtype) for piece in _features(context)], dim=-1)
    if split is not None:
        past = PomState(past.sum + split.before(sums[:, -1]), past.count + split.start)
    sums = sums + past.sum[:, None]
    counts = past.count[:, None] + torch.arange(1, num_tokens + 1, device=sums.device)
    # This is a copy, since a view of the last row would keep all n rows alive for as long as the state is carried.
    state = PomState(sums[:, -1].clone() if num_tokens else past.sum, past.count + num_tokens)
    return select(context, queries, sums / counts[..., None]), state


def _block_causal(
    context: Context, queries: Queries, frame_length: int, past: PomState, split: TokenSplit | None = None
) -> tuple[Tensor, PomState]:
    """Mix block-causally: S_f = sum of h over frame f; H_f = (past + S_1 + .. + S_f) / (tokens up to its end)."""
    num_tokens, dtype = context.u.shape[1], accumulation_dtype(context.u.dtype)
    start, num_in_all = (0, num_tokens) if split is None else (split.start, split.num_tokens)
    pieces, runs = _features(context), runs_of_frames(start, num_tokens, frame_length)
    frame_sums = _joined([_sums_of_frames(pieces, *run, dtype) for run in runs])
    sums = frame_sums.cumsum(1)
    if split is not None:
        before, after = split.around(sums[:, -1], frame_sums[:, 0], frame_length)
        past = PomState(past.sum + before, past.count)
        sums = torch.cat([sums[:, :-1], sums[:, -1:] + after[:, None]], dim=1)
    sums = sums + past.sum[:, None]
    ends = (start // frame_length + torch.arange(1, sums.shape[1] + 1, device=sums.device)) * frame_length
    means = sums / (past.count[:, None] + ends.clamp(max=num_in_all))[..., None]
    y, frame = [], 0
    for a, b, frames in runs:
        y.append(select(context, queries.part(a, b), means[:, frame : frame + frames]))
        frame += frames
    state = PomState(sums[:, -1].clone() if num_tokens else past.sum, past.count + num_tokens)
    return _joined(y), state


def _sums_of_frames(pieces: list[Tensor], begin: int, end: int, num_frames: int, dtype: torch.dtype) -> Tensor:
    """Return the sums (b f W) over `num_frames` equal parts of the tokens begin .. end - 1."""
    shape = (num_frames, (end - begin) // max(num_frames, 1))
    return torch.cat([piece[:, begin:end].unflatten(1, shape).sum(2, dtype=dtype) for piece in pieces], dim=-1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join along the tokens or frames, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _segments(context: Context, queries: Queries, segments: Segments) -> Tensor:
    """Mix each segment alone; loops run over segments, and never over tokens or pairs of them."""
    lengths, context_lengths = list(segments.lengths), list(segments.of_context)
    dtype = accumulation_dtype(context.u.dtype)
    # Every segment adds to the gradients of these two, and sums of many in bf16 would lose the small ones.
    if context.coefficients is not None:
        context = replace(context, coefficients=context.coefficients.to(dtype))
    if queries.output is not None:
        queries = replace(queries, output=queries.output.to(dtype))
    if segments.inner is not None:
        parts = zip(context.split(context_lengths), queries.split(lengths), strict=True)
        return torch.cat([polynomial_mixer(*part, segments.inner, None) for part in parts], dim=1)
    # Everything but sums and selections is done for all segments at once.
    pieces = [piece.split(context_lengths, dim=1) for piece in _features(context)]
    sums = torch.cat([torch.stack([part.sum(1, dtype=dtype) for part in piece], dim=1) for piece in pieces], dim=-1)
    counts = torch.tensor(context_lengths, device=sums.device).clamp(min=1)
    means = (sums / counts[:, None]).split(1, dim=1)
    gates = _gates(context, queries).split(lengths, dim=1)
    heads, output = context.form.heads, queries.output
    return torch.cat([_gated(*part, heads, output) for part in zip(gates, means, strict=True)], dim=1)
