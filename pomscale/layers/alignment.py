"""Projection of hidden states to the features of a frozen teacher, for the alignment loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AlignmentProjection(nn.Module):
    """Map hidden states (b n d) -> (b n width): three linear maps with SiLU between (REPA, arXiv 2410.06940, A.1).

    Args:
        dim: Width d of the hidden states.
        hidden: Width between the maps.
        width: Width of the teacher's features.
    """

    def __init__(self, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        # No view of what the last map gives, on which FSDP could not hang its backward hooks.
        return self.third(F.silu(self.second(F.silu(self.first(x))))).clone()
