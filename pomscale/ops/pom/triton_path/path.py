"""Entry of the Triton path: from a mask to groups of tokens or to a scan, and from states to the result.

Shapes: b samples, m queries, n context tokens, W features, f groups of queries that share a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.ops.pom.masks import BlockCausal, Mask, Segments
from pomscale.ops.pom.operands import Context, Queries
from pomscale.ops.pom.state import PomState
from pomscale.ops.pom.torch_path import select as select_heads
from pomscale.ops.pom.triton_path import grouped, layout
from pomscale.ops.pom.triton_path.scanned import scan


@dataclass(frozen=True)
class _Groups:
    """Segments of queries and of context (empty = one of all), and the frames that divide each (0 = none)."""

    lengths: Sequence[int] = ()
    context_lengths: Sequence[int] = ()
    frame_length: int = 0

    def of_queries(self, num_queries: int) -> list[int]:
        """Return the number of queries of each group."""
        return list(chain(*layout.group_lengths(self.lengths or [num_queries], self.frame_length)))


def polynomial_mixer(context: Context, queries: Queries, mask: Mask) -> Tensor:
    """Mix -> (b m W) or, through the linear map, (b m d), in the dtype of the gates; mask (b m n) is not served."""
    inner = mask.inner if isinstance(mask, Segments) else mask
    if isinstance(inner, str):
        return _causal(context, queries, mask.lengths if isinstance(mask, Segments) else (), None)[0]
    groups = _groups(mask)
    sums, counts = _sums(context, groups, mask if isinstance(mask, Tensor) else None)
    return _select(context, queries, groups, sums / counts.clamp(min=1)[..., None])


def polynomial_mixer_step(context: Context, queries: Queries, past: PomState, mask: Mask) -> tuple[Tensor, PomState]:
    """Mix one chunk after the tokens of `past`, and return the state after it."""
    if isinstance(mask, str):
        return _causal(context, queries, (), past)
    groups = _groups(mask)
    sums, counts = _sums(context, groups, mask if isinstance(mask, Tensor) else None)
    sums, counts = past.sum[:, None] + sums, past.count[:, None] + counts
    y = _select(context, queries, groups, sums / counts.clamp(min=1)[..., None])
    return y, PomState(sums[:, -1].clone(), counts[:, -1].clone())


def _groups(mask: Mask) -> _Groups:
    inner = mask.inner if isinstance(mask, Segments) else mask
    frame_length = inner.frame_length if isinstance(inner, BlockCausal) else 0
    if isinstance(mask, Segments):
        return _Groups(mask.lengths, mask.of_context, frame_length)
    return _Groups(frame_length=frame_length)


def _sums(context: Context, groups: _Groups, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of what each group reads (b f W) fp32, and its number of tokens (b f) or (1 f) int64."""
    u, form = context.u, context.form
    sums = grouped.aggregate(
        u,
        context.coefficients,
        context.positions,
        mask,
        form.degree,
        form.rope or 0,
        groups.context_lengths,
        groups.frame_length,
    )
    if mask is not None:
        return sums, mask.sum(1, keepdim=True)
    return sums, _counts(u, groups)


def _counts(u: Tensor, groups: _Groups) -> Tensor:
    num_tokens, frame_length = u.shape[1], groups.frame_length
    if groups.context_lengths:
        return layout.grouped(groups.context_lengths, frame_length, u.device).counts
    if not frame_length:
        return torch.full((1, 1), num_tokens, dtype=torch.int64, device=u.device)
    num_groups = grouped.num_groups(num_tokens, (), frame_length)
    return (torch.arange(1, num_groups + 1, device=u.device) * frame_length).clamp(max=num_tokens)[None]


def _select(context: Context, queries: Queries, groups: _Groups, means: Tensor) -> Tensor:
    form, gate = context.form, queries.gate
    if form.heads == 1:
        y = grouped.select(
            means,
            gate,
            queries.positions,
            form.name == "product",
            form.rope or 0,
            form.degree,
            groups.lengths,
            groups.frame_length,
        )
        return y if queries.output is None else F.linear(y, queries.output)
    # Neighbouring groups of one length are selected from at once: all frames but a shorter last, equal segments.
    runs = [(length, len(list(equal))) for length, equal in groupby(groups.of_queries(gate.shape[1]))]
    tokens, counts = [length * count for length, count in runs], [count for _, count in runs]
    positions: Sequence[Tensor | None] = [None] * len(runs)
    if queries.positions is not None:
        positions = queries.positions.split(tokens, dim=-2)
    parts = [
        select_heads(context, replace(queries, gate=part, positions=where), mean)
        for part, where, mean in zip(gate.split(tokens, dim=1), positions, means.split(counts, dim=1), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _causal(
    context: Context, queries: Queries, lengths: Sequence[int], past: PomState | None
) -> tuple[Tensor, PomState]:
    u, form = context.u, context.form
    y, totals = scan(
        u,
        queries.gate if form.heads == 1 else None,
        context.coefficients,
        context.positions,
        queries.positions if form.heads == 1 else None,
        None if past is None else past.sum[:, None],
        None if past is None else past.count,
        queries.gate.dtype,
        form.degree,
        form.rope or 0,
        lengths,
    )
    if form.heads > 1:
        y = select_heads(context, queries, y)
    elif queries.output is not None:
        y = F.linear(y, queries.output)
    num_tokens = u.shape[1]
    count = torch.full((u.shape[0],), num_tokens, dtype=torch.int64, device=u.device)
    return y, PomState(totals[:, -1], count if past is None else past.count + num_tokens)
