"""Masks: which context tokens a query reads. True always means that the token takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, Union

import torch
from torch import Tensor

from pomscale.ops.pom.form import check_count


@dataclass(frozen=True)
class BlockCausal:
    """Frames of `frame_length` tokens (the last may be shorter): a token reads its own frame and all earlier ones."""

    frame_length: int

    def __post_init__(self) -> None:
        check_count("BlockCausal: frame_length", self.frame_length)


Order: TypeAlias = Literal["causal"] | BlockCausal


@dataclass(frozen=True)
class Segments:
    """Packed sequences: the tokens are sequences of `lengths`, one after another, and each reads its own alone.

    lengths: number of query tokens of each segment, the same for all samples of the batch.
    context_lengths: number of context tokens of each segment, e.g. of the text of each picture; None = the queries are
        the context. A segment without context reads nothing.
    inner: order within each segment; only where queries and context are the same tokens.
    Raises ValueError for lengths that are no whole numbers of at least 0, for no segment at all, and for lists of
    different lengths.
    """

    lengths: Sequence[int]
    context_lengths: Sequence[int] | None = None
    inner: Order | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "context_lengths"):
            lengths = getattr(self, name)
            if lengths is None:
                continue
            lengths = lengths.tolist() if hasattr(lengths, "tolist") else lengths  # of torch or numpy
            if isinstance(lengths, str) or not isinstance(lengths, Sequence) or not lengths:
                raise ValueError(f"Segments: expected {name} of at least one segment, got {lengths!r}")
            for length in lengths:
                check_count(f"Segments: {name}", length, 0)
            object.__setattr__(self, name, tuple(lengths))
        if self.context_lengths is not None:
            if len(self.context_lengths) != len(self.lengths):
                raise ValueError(
                    f"Segments: expected a context length for each of {len(self.lengths)} segments, "
                    f"got {len(self.context_lengths)}"
                )
            if self.inner is not None and self.context_lengths != self.lengths:
                raise ValueError("Segments: inner needs queries and context to be the same tokens")
        if self.inner is not None and not isinstance(self.inner, BlockCausal) and self.inner != "causal":
            raise ValueError(f'Segments: inner must be None, "causal" or BlockCausal, got {self.inner!r}')

    @property
    def of_context(self) -> Sequence[int]:
        """Number of context tokens of each segment."""
        return self.lengths if self.context_lengths is None else self.context_lengths


# A tensor is bool: (b n) = padding of the context, (b m n) = any pattern. "causal", BlockCausal and Segments without
# context_lengths divide the tokens of one sequence, so they need queries and context to be the same tokens.
Mask: TypeAlias = Union[Literal["causal"], BlockCausal, Segments, Tensor, None]


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
    if isinstance(mask, Segments):
        for what, lengths, total in (
            ("lengths", mask.lengths, num_queries),
            ("context_lengths (by default lengths)", mask.of_context, num_context),
        ):
            if sum(lengths) != total:
                raise ValueError(f"Segments: {what} must add up to the {total} tokens, got {sum(lengths)}")
        return
    if not isinstance(mask, BlockCausal) and mask != "causal":
        raise ValueError(f'mask: expected None, "causal", BlockCausal, Segments or a bool tensor, got {mask!r}')
    if num_queries != num_context:
        raise ValueError(
            f"mask: {mask!r} needs queries and context to be the same tokens, "
            f"got {num_queries} queries and {num_context} context tokens"
        )


def check_step_mask(mask: Mask) -> None:
    """Raise ValueError for a mask that has no meaning for the next chunk of a sequence."""
    if isinstance(mask, Segments) or (isinstance(mask, Tensor) and mask.dim() == 3):
        got = "Segments" if isinstance(mask, Segments) else f"shape {tuple(mask.shape)}"
        raise ValueError(f'step: mask must be None, "causal", BlockCausal or bool (b n), got {got}')


def dense_mask(mask: Mask, batch: int, num_queries: int, num_context: int, device: torch.device) -> Tensor:
    """Return the mask as bool (b m n); broadcast dimensions are expanded views."""
    shape = (batch, num_queries, num_context)
    if isinstance(mask, Tensor):
        return mask if mask.dim() == 3 else mask[:, None, :].expand(shape)
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=device).expand(shape)
    if isinstance(mask, Segments):
        blocks = [
            dense_mask(mask.inner, 1, queries, context, device)[0]
            for queries, context in zip(mask.lengths, mask.of_context, strict=True)
        ]
        return torch.block_diag(*blocks).bool().expand(shape)
    frame_length = mask.frame_length if isinstance(mask, BlockCausal) else 1
    query_frame = torch.arange(num_queries, device=device) // frame_length
    context_frame = torch.arange(num_context, device=device) // frame_length
    return (context_frame[None, :] <= query_frame[:, None]).expand(shape)
