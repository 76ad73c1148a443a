"""Multi-head attention behind the interface of the Polynomial Mixer: the baseline it is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    Raises ValueError unless num_heads divides dim.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_count("Attention: dim", dim)
        check_count("Attention: num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"Attention: num_heads {num_heads} does not divide dim {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.stacked_maps = {"key_value": 2}
        self.output = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Mask = None, split: TokenSplit | None = None
    ) -> Tensor:
        """Let x (b m d) read context (b n d), by default x itself -> (b m d).

        Masks as in `PoM.forward`, built densely except for None and "causal", and for Segments one by one. For a query
        with an empty context the heads give 0. Raises ValueError for a mask that does not fit, and for a split: a query
        has to read every token, and not a sum over them.
        """
        if split is not None:
            raise ValueError("split: attention reads all tokens, which cannot be split over ranks; use PoM")
        context = x if context is None else context
        check_tokens(x, context, self.dim)
        batch, num_queries, num_context = x.shape[0], x.shape[1], context.shape[1]
        check_mask(mask, batch, num_queries, num_context)
        query = self._split_heads(self.query(x))
        key, value = (self._split_heads(part) for part in self.key_value(context).chunk(2, dim=-1))
        heads = _read(query, key, value, mask)
        return self._merge_heads(heads)

    def step(self, x: Tensor, state: AttentionState | None = None, mask: Mask = None) -> tuple[Tensor, AttentionState]:
        """Map the next chunk x (b n d) of a sequence -> (b n d) and the state to pass to the next call.

        mask is as in `PoM.step`: None, bool (b n), "causal" or BlockCausal.
        """
        check_tokens(x, x, self.dim)
        batch, num_tokens, _ = x.shape
        check_mask(mask, batch, num_tokens, num_tokens)
        check_step_mask(mask)
        if state is not None:
            self._check_state(state, batch)
        key, value = (self._split_heads(part) for part in self.key_value(x).chunk(2, dim=-1))
        takes_part = mask if isinstance(mask, Tensor) else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        readable = dense_mask(mask, batch, num_tokens, num_tokens, x.device)
        if state is not None:
            past = state.takes_part[:, None, :].expand(-1, num_tokens, -1)
            readable = torch.cat([past, readable], dim=2)
            key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
            takes_part = torch.cat([state.takes_part, takes_part], dim=1)
        heads = _attend(self._split_heads(self.query(x)), key, value, readable)
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

    def _split_heads(self, x: Tensor) -> Tensor:
        """Split x (b n d) -> (b heads n d/heads)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _merge_heads(self, heads: Tensor) -> Tensor:
        """Join heads (b heads n d/heads) -> (b n d), through the output map."""
        return self.output(heads.transpose(1, 2).flatten(2))


def _read(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attend -> (b heads m d/heads)."""
    batch, num_queries, num_context = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, Segments):
        queries = query.split(list(mask.lengths), dim=2)
        keys, values = (part.split(list(mask.of_context), dim=2) for part in (key, value))
        return torch.cat([_read(*parts, mask.inner) for parts in zip(queries, keys, values, strict=True)], dim=2)
    if num_context == 0:
        return torch.zeros_like(query)
    if mask is None or isinstance(mask, str):
        return F.scaled_dot_product_attention(query, key, value, is_causal=mask is not None)
    if isinstance(mask, BlockCausal):
        # The same for all samples, and every query reads something: no b m n booleans, no rows to set to 0.
        readable = dense_mask(mask, 1, num_queries, num_context, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=readable[:, None])
    return _attend(query, key, value, dense_mask(mask, batch, num_queries, num_context, query.device))


def _attend(query: Tensor, key: Tensor, value: Tensor, readable: Tensor) -> Tensor:
    """Attend under a dense mask `readable` (b m n); rows that read nothing give 0."""
    readable = readable[:, None]
    # A softmax over nothing is NaN in some backends: such rows read everything, and what they read is dropped.
    empty = ~readable.any(-1, keepdim=True)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=readable | empty)
    return heads.masked_fill(empty, 0.0)
