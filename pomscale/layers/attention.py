"""Multi-head attention behind the interface of the Polynomial Mixer: the baseline it is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.layers.norm import RMSNorm
from pomscale.ops.pom import (
    BlockCausal,
    Mask,
    Segments,
    TokenSplit,
    check_count,
    check_mask,
    check_step_mask,
    check_tokens,
    dense_mask,
)
from pomscale.ops.pom.rotary import check_positions, cos_sin, num_pairs, rotate


@dataclass(frozen=True)
class AttentionState:
    """State that attention carries of n past tokens: key and value (b heads n d/heads), takes_part (b n) bool."""

    key: Tensor
    value: Tensor
    takes_part: Tensor


class Attention(nn.Module):
    """Scaled dot-product attention with the masks, cross form and carried state of `PoM`; its state grows with n.

    The query has its own map, because in the cross form it reads another sequence than key and value: an official
    fused qkv weight is split, first third to `query`, the rest to `key_value`.

    Rotary positions turn pairs of channels of every head's query and key as those of PoM: of the 2 P channels of an
    axis, channel c with channel c + P. Code that pairs neighbours (2c, 2c + 1) computes the same from weights whose
    rows are in another order.

    Args:
        dim: Width d of the tokens.
        num_heads: Number of heads.
        qk_norm: Apply an RMS norm with weights to the query and to the key of every head.
        rope: Axes of the rotary positions, or None.

    Raises:
        ValueError: num_heads does not divide dim, or rope does not fit the width of a head.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, rope: Literal[1, 2, 3] | None = None) -> None:
        super().__init__()
        check_count("Attention: dim", dim)
        check_count("Attention: num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads {num_heads} does not divide dim {dim}")
        if rope is not None:
            num_pairs(dim // num_heads, rope, "channels of a head")
        self.dim, self.num_heads, self.rope = dim, num_heads, rope
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.stacked_maps = {"key_value": 2}
        self.output = nn.Linear(dim, dim)
        self.query_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Let x (b m d) read context (b n d), by default x itself -> (b m d).

        Masks and positions are as in `PoM.forward`; masks are built densely except for None and "causal", and for
        Segments one by one. For a query with an empty context the heads give 0. Raises ValueError for a mask or
        positions that do not fit, and for a split: a query has to read every token, and not a sum over them.
        """
        if split is not None:
            raise ValueError("split: attention reads all tokens, which cannot be split over ranks; use PoM")
        if context is None and context_positions is None:
            context_positions = positions
        context = x if context is None else context
        check_tokens(x, context, self.dim)
        batch, num_queries, num_context = x.shape[0], x.shape[1], context.shape[1]
        check_mask(mask, batch, num_queries, num_context)
        check_positions("positions", positions, self.rope, batch, num_queries)
        check_positions("context_positions", context_positions, self.rope, batch, num_context)
        query = self._queries(x, positions)
        key, value = self._keys_and_values(context, context_positions)
        heads = _read(query, key, value, mask)
        return self._merge_heads(heads)

    def step(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        mask: Mask = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Map the next chunk x (b n d) of a sequence -> (b n d) and the state to pass to the next call.

        mask is as in `PoM.step`: None, bool (b n), "causal" or BlockCausal. positions are those of the chunk.
        """
        check_tokens(x, x, self.dim)
        batch, num_tokens, _ = x.shape
        check_mask(mask, batch, num_tokens, num_tokens)
        check_step_mask(mask)
        if state is not None:
            self._check_state(state, batch)
        check_positions("positions", positions, self.rope, batch, num_tokens)
        key, value = self._keys_and_values(x, positions)
        takes_part = mask if isinstance(mask, Tensor) else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        readable = dense_mask(mask, batch, num_tokens, num_tokens, x.device)
        if state is not None:
            past = state.takes_part[:, None, :].expand(-1, num_tokens, -1)
            readable = torch.cat([past, readable], dim=2)
            key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
            takes_part = torch.cat([state.takes_part, takes_part], dim=1)
        heads = _attend(self._queries(x, positions), key, value, readable)
        return self._merge_heads(heads), AttentionState(key, value, takes_part)

    def _check_state(self, state: AttentionState, batch: int) -> None:
        """Raise ValueError unless `state` is one of `batch` samples of a layer of this width and number of heads."""
        if not isinstance(state, AttentionState):
            raise ValueError(f"step: expected an AttentionState, got {type(state).__name__}")
        num_past = state.takes_part.shape[-1]
        expected = (batch, self.num_heads, num_past, self.dim // self.num_heads)
        got = tuple(state.key.shape), tuple(state.value.shape), tuple(state.takes_part.shape)
        if got != (expected, expected, (batch, num_past)):
            raise ValueError(
                f"step: expected a state with key and value {expected} and takes_part {(batch, num_past)}, got {got}"
            )

    def _queries(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Map x (b m d) -> (b heads m d/heads)."""
        return self._rotated(self.query_norm(self._split_heads(self.query(x))), positions).transpose(1, 2)

    def _keys_and_values(self, context: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map the context (b n d) -> two of (b heads n d/heads)."""
        key, value = (self._split_heads(part) for part in self.key_value(context).chunk(2, dim=-1))
        return self._rotated(self.key_norm(key), positions).transpose(1, 2), value.transpose(1, 2)

    def _split_heads(self, x: Tensor) -> Tensor:
        """Split x (b n d) -> (b n heads d/heads)."""
        return x.unflatten(2, (self.num_heads, -1))

    def _rotated(self, heads: Tensor, positions: Tensor | None) -> Tensor:
        """Turn (b n heads d/heads) by the positions of the tokens, if there is rope."""
        if self.rope is None:
            return heads
        assert positions is not None, "check_positions"
        tables = cos_sin(positions, heads.shape[-1], self.rope)
        return rotate(heads, [(cos.unsqueeze(-2), sin.unsqueeze(-2)) for cos, sin in tables])

    def _merge_heads(self, heads: Tensor) -> Tensor:
        """Join heads (b heads n d/heads) -> (b n d), through the output map."""
        return self.output(heads.transpose(1, 2).flatten(2))


def _read(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attend -> (b heads m d/heads)."""
    batch, num_queries, num_context = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, Segments):
        return _read_segments(query, key, value, mask)
    if num_context == 0:
        return torch.zeros_like(query)
    if mask is None or isinstance(mask, str):
        return F.scaled_dot_product_attention(query, key, value, is_causal=mask is not None)
    if isinstance(mask, BlockCausal):
        # The same for all samples, and every query reads something: no b m n booleans, no rows to set to 0.
        readable = dense_mask(mask, 1, num_queries, num_context, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=readable[:, None])
    return _attend(query, key, value, dense_mask(mask, batch, num_queries, num_context, query.device))


def _read_segments(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attend within each segment; neighbours of one length are samples of one call."""
    pairs = groupby(zip(segments.lengths, segments.of_context, strict=True))
    runs = [(*lengths, len(list(equal))) for lengths, equal in pairs]
    queries = query.split([length * count for length, _, count in runs], dim=2)
    keys, values = (part.split([length * count for _, length, count in runs], dim=2) for part in (key, value))
    heads = []
    for (length, context_length, count), *parts in zip(runs, queries, keys, values, strict=True):
        lengths = (length, context_length, context_length)
        of_run = [  # (b count heads length ..)
            part.unflatten(2, (count, each)).transpose(1, 2).flatten(0, 1)
            for part, each in zip(parts, lengths, strict=True)
        ]
        read = _read(of_run[0], of_run[1], of_run[2], segments.inner)
        heads.append(read.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3))
    return torch.cat(heads, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, readable: Tensor) -> Tensor:
    """Attend under a dense mask `readable` (b m n); rows that read nothing give 0."""
    readable = readable[:, None]
    # A softmax over nothing is NaN in some backends: such rows read everything, and what they read is dropped.
    empty = ~readable.any(-1, keepdim=True)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=readable | empty)
    return heads.masked_fill(empty, 0.0)
