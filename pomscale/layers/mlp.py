"""Feed-forward half of a block."""

from __future__ import annotations

from torch import nn


class FeedForward(nn.Sequential):
    """Map (.. d) -> (.. d): Linear to expansion * d, exact GELU, Linear back."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))
