"""Texts as networks read them: their tokens embedded, and put before those of a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.base.condition import Text
from pomscale.ops.pom import TokenSplit


def embed_text(embedding: nn.Linear, text: Text) -> Tensor:
    """Map the embeddings of texts (b m text_dim), of any dtype, -> (b m d) in that of the weights."""
    return embedding(text.embeddings.to(embedding.weight.dtype))


class JoinedTokens(NamedTuple):
    """Tokens in context and those of a picture at hand (b n d), the positions, the split and the mask (b n) of them.

    mask is None where all tokens take part, positions where no mixer has rope, and split where one rank has all tokens.
    """

    x: Tensor
    positions: Tensor | None
    split: TokenSplit | None
    mask: Tensor | None


def put_before(
    context: Tensor, mask: Tensor | None, x: Tensor, positions: Tensor | None, split: TokenSplit | None
) -> JoinedTokens:
    """Put tokens in context (b k d) before a picture's x (b n d).

    Their position is (0, 0), which turns nothing. Where ranks share the tokens of a sample, the first one has those in
    context beside its own.

    Args:
        context: tokens in context; all ranks give the same.
        mask: (b k) bool, True where they take part; None = everywhere.
        x: tokens of the picture at hand.
        positions: (n 2) integers, those of x, or None without rope.
        split: where the tokens of the picture lie, or None.
    """
    if split is not None:
        num_context = context.shape[1]
        split = replace(split, bounds=(0, *(num_context + bound for bound in split.bounds[1:])))
        if split.rank > 0:
            # None of the tokens, yet a gradient, of zeros, for the parameters that they come from: engines treat a
            # parameter without a gradient each in its own way.
            context, mask = context[:, :0], None if mask is None else mask[:, :0]
    if positions is not None:
        positions = F.pad(positions, (0, 0, context.shape[1], 0))
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)
    return JoinedTokens(torch.cat([context, x], dim=1), positions, split, mask)
