"""Masks: which context tokens a query reads. True always means that the token takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, Union

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockCausal:
    """Frames of `frame_length` tokens (the last may be shorter): a token reads its own frame and all earlier ones."""

    frame_length: int

    def __post_init__(self) -> None:
        if self.frame_length < 1:
            raise ValueError(f"BlockCausal: frame_length must be at least 1, got {self.frame_length}")


# A tensor is bool: (b n) = padding of the context, (b m n) = any pattern. "causal" and BlockCausal order the tokens of
# one sequence, so they need queries and context to be the same tokens.
Mask: TypeAlias = Union[Literal["causal"], BlockCausal, Tensor, None]


def check_mask(mask: Mask, batch: int, num_queries: int, num_context: int) -> None:
    """Raise ValueError unless `mask` fits `num_queries` queries that read `num_context` context tokens."""
    if mask is None:
        return
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected a bool tensor (True = takes part), got {mask.dtype}")
        expected = [(batch, num_context), (batch, num_queries, num_context)]
        if tuple(mask.shape) not in expected:
            raise ValueError(f"mask: expected shape {expected[0]} or {expected[1]}, got {tuple(mask.shape)}")
        return
    if not isinstance(mask, BlockCausal) and mask != "causal":
        raise ValueError(f'mask: expected None, "causal", BlockCausal or a bool tensor, got {mask!r}')
    if num_queries != num_context:
        raise ValueError(
            f"mask: {mask!r} needs queries and context to be the same tokens, "
            f"got {num_queries} queries and {num_context} context tokens"
        )


def dense_mask(mask: Mask, batch: int, num_queries: int, num_context: int, device: torch.device) -> Tensor:
    """Return the mask as bool (b m n); broadcast dimensions are expanded views."""
    shape = (batch, num_queries, num_context)
    if isinstance(mask, Tensor):
        return mask if mask.dim() == 3 else mask[:, None, :].expand(shape)
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=device).expand(shape)
    frame_length = mask.frame_length if isinstance(mask, BlockCausal) else 1
    query_frame = torch.arange(num_queries, device=device) // frame_length
    context_frame = torch.arange(num_context, device=device) // frame_length
    return (context_frame[None, :] <= query_frame[:, None]).expand(shape)
