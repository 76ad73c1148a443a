"""State of a Polynomial Mixer: a sum over tokens and their number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pomscale.ops.pom.form import Form


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class PomState:
    """Everything that a set of tokens leaves behind for later queries.

    sum: (b, W) fp32 (float64 for float64 inputs), sum of the features of the tokens that took part.
    count: (b,) int64, number of those tokens. Kept beside the sum because a mean of means is wrong for unequal chunks.
    form: Form of the mixer that a step returned the state of; None = not known, as of a state read from a file.
    """

    sum: Tensor
    count: Tensor
    form: Form | None = None

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
        """Return H (b, W), which is 0 where no token took part."""
        return self.sum / self.count.clamp(min=1)[:, None]

    def check(self, batch: int, width: int, form: Form) -> None:
        """Raise ValueError unless a step of `batch` samples of `width` features of `form` can go on from this state."""
        expected, got = ((batch, width), (batch,)), (tuple(self.sum.shape), tuple(self.count.shape))
        if got != expected:
            raise ValueError(
                f"step: expected a state of shape {expected[0]} with counts {expected[1]}, got {got[0]} and {got[1]}"
            )
        if self.form not in (None, form):
            raise ValueError(f"step: expected a state of {form}, got one of {self.form}")
