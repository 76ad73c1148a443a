"""Feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Drop = Callable[[Tensor], Tensor]
"""Dropout of the hidden features."""


class FeedForward(nn.Sequential):
    """Map (.. d) -> (.. d): Linear to `width`, exact GELU, Linear back."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        hidden = self[1](self[0](x))
        return self[2](hidden if drop is None else drop(hidden))


class SwiGLU(nn.Module):
    """Map (.. d) -> (.. d): a, b = Linear to 2 `width`; Linear back of silu(a) o b (Shazeer 2020)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * width)
        self.contract = nn.Linear(width, dim)
        self.stacked_maps = {"expand": 2}

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        return self.contract(hidden if drop is None else drop(hidden))
