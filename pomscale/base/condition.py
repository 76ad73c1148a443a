"""Condition of a sample: its class, or a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad


class Text(NamedTuple):
    """Embeddings of captions, as a tuple, so that torch's tree functions (FSDP's casts, compile) see the tensors.

    Attributes:
        embeddings: (b, n, dim) floating; any value where `mask` is False.
        mask: (b, n) bool, True = a token of the text.
    """

    embeddings: Tensor
    mask: Tensor


class PackedText(NamedTuple):
    """Embeddings of captions one after another, without padding.

    Attributes:
        embeddings: (n, dim) floating, the tokens of all texts.
        lengths: Number of tokens of each text.
    """

    embeddings: Tensor
    lengths: tuple[int, ...]


Condition: TypeAlias = Tensor | Text
"""Class ids (b,) int64, or a text batch."""


def map_condition(condition: Condition, function: Callable[[Tensor], Tensor]) -> Condition:
    """Return the condition with `function` applied to each of its tensors."""
    return Text(*map(function, condition)) if isinstance(condition, Text) else function(condition)


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Join several batches of one kind to one batch; texts are padded to the longest."""
    texts = [part for part in parts if isinstance(part, Text)]
    if not texts:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    assert len(texts) == len(parts), "classes and texts do not mix"
    longest = max(text.mask.shape[1] for text in texts)
    return Text(
        torch.cat([pad(text.embeddings, (0, 0, 0, longest - text.mask.shape[1])) for text in texts]),
        torch.cat([pad(text.mask, (0, longest - text.mask.shape[1])) for text in texts]),
    )


def batch_size(condition: Condition) -> int:
    """Number of samples of the condition."""
    return len(condition.mask if isinstance(condition, Text) else condition)


def device_of(condition: Condition) -> torch.device:
    """Device of the condition's tensors."""
    return (condition.mask if isinstance(condition, Text) else condition).device
