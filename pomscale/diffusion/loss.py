"""The training loss, one number per sample."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.diffusion.objectives import Objective, interpolate

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents (b, ...), t (b,) or (b, g), condition) -> prediction (b, ...)."""


def per_sample_loss(
    objective: Objective, network: Network, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """Mean squared error over the elements of each sample, (b,) fp32."""
    prediction = network(interpolate(objective, x0, eps, t), t, condition)
    error = prediction.float() - objective.target(x0, eps).float()
    return error.square().flatten(1).mean(1)
