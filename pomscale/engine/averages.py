"""Moving averages of sharded weights: each rank averages its own shards, without communication.

Two profiles (Karras et al. 2024, "EDM2", arXiv 2312.02696): exponential, by half-life in samples, with a warm-up; and
power functions, whose snapshots give any other profile after training (`pretrained.post_hoc`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pomscale.config.engine import EmaConfig


def ema_weights(config: EmaConfig, samples: int, batch: int) -> dict[str, float]:
    """Return the weight of the new parameters in each average at a step that ends at `samples` seen."""
    longest = math.inf if config.rampup_ratio is None else samples * config.rampup_ratio
    weights = [1 - 0.5 ** (batch / min(halflife, longest)) for halflife in config.halflives_samples]
    if config.post_hoc is not None:
        # beta(t) = (1 - 1/t)^(gamma + 1), equation 127, t counted in steps of `batch` samples.
        weights += [1 - (1 - batch / samples) ** (power_exponent(width) + 1) for width in config.post_hoc.widths]
    return dict(zip(config.averages, weights, strict=True))


def power_exponent(width: float) -> float:
    """Return gamma of the power function t^gamma on [0, 1] whose standard deviation is `width` (EDM2, algorithm 2).

    sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the largest real root of that cubic in gamma.
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Ema:
    """Averages of fp32 `tensors`, which this rank holds and the optimiser changes in place."""

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.averages: dict[str, list[Tensor]] = {name: [t.clone() for t in tensors] for name in names}

    @torch.no_grad()
    def update(self, weights: Mapping[str, float]) -> None:
        """Set average += weight (tensor - average) for each average; `weights` are by name of the average."""
        for name, average in self.averages.items():
            torch._foreach_lerp_(average, self._tensors, weights[name])

    @contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """Let the tensors hold this average within the block; needs memory for one more tensor, not for a model."""
        self._swap(self.averages[name])
        try:
            yield
        finally:
            self._swap(self.averages[name])

    @torch.no_grad()
    def _swap(self, average: list[Tensor]) -> None:
        for held, averaged in zip(self._tensors, average, strict=True):
            kept = held.clone()
            held.copy_(averaged)
            averaged.copy_(kept)
