"""Alignment of hidden states with the features of a frozen teacher (REPA, Yu et al. 2024, arXiv 2410.06940)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pomscale.base.condition import Condition

_LEAST_NORM = 1e-12
"""Least norm that a vector is divided by, as of torch.nn.functional.normalize."""


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return - the mean over the tokens of cos(projection, feature), (b,), in fp32 or, of fp64, in fp64: equation 8.

    Args:
        projected: Projections of the hidden states (b n d), with gradient.
        features: The teacher's features of the same tokens (b n d), without gradient; a feature of zeros counts 0.
    """
    projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
    directions = torch.nn.functional.normalize(features.to(projected.dtype), dim=-1, eps=_LEAST_NORM)
    lengths = torch.linalg.vector_norm(projected, dim=-1).clamp_min(_LEAST_NORM)
    return -((projected * directions).sum(-1) / lengths).mean(-1)


class AlignedNetwork:
    """A network, for `per_sample_loss`, that keeps the projections which it gives beside its prediction.

    Attributes:
        projected: (num_aligned n dim) of the last call.
    """

    projected: Tensor

    def __init__(self, network: Callable[..., Any], num_aligned: int) -> None:
        """Wrap `network`, a model with a projection; the first `num_aligned` samples are projected."""
        self._network, self._num_aligned = network, num_aligned

    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction, self.projected = self._network(latents, t, condition, num_aligned=self._num_aligned)
        return prediction
