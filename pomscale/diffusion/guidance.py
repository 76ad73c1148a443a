"""Classifier-free guidance (Ho & Salimans 2022): pred_c + w (pred_c - pred_u)."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.base.condition import Condition, join_conditions
from pomscale.diffusion.objectives import Network
from pomscale.diffusion.samplers.types import Denoiser


def guided(network: Network, condition: Condition, null_condition: Condition, weight: float) -> Denoiser:
    """Return the network as a function of (x, t) alone, with the conditions of a batch bound and guidance applied.

    weight 0 is off and costs one evaluation per step; any other weight evaluates both halves in one batch, the
    conditional one first. weight = diffusers' `guidance_scale` - 1.
    """
    if weight == 0:
        return lambda x, t: network(x, t, condition)
    both = join_conditions([condition, null_condition])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return conditional + weight * (conditional - unconditional)

    return denoise
