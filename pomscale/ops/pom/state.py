"""State of a Polynomial Mixer: a sum over tokens and their number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class PomState:
    """Everything that a set of tokens leaves behind for later queries.

    sum: (b, kD) fp32 (float64 for float64 inputs), sum of the monomials of the tokens that took part.
    count: (b,) int64, number of those tokens. Kept beside the sum because a mean of means is wrong for unequal chunks.
    """

    sum: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> PomState:
        """Return the state of no tokens, for pre-activations of type `dtype`."""
        return cls(
            torch.zeros(batch, width, dtype=accumulation_dtype(dtype), device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def __add__(self, other: PomState) -> PomState:
        """Return the state of the union of two disjoint sets of tokens."""
        return PomState(self.sum + other.sum, self.count + other.count)

    def mean(self) -> Tensor:
        """Return H (b, kD), which is 0 where no token took part."""
        return self.sum / self.count.clamp(min=1)[:, None]
