"""Guidance: pred + w (pred - worse), where `worse` comes without the condition or from a weaker network.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, whose w this is) asks the same network without the
condition; autoguidance (Karras et al. 2024, arXiv 2406.02507, whose w is ours + 1) asks a weaker network, the guide,
with it. Guidance in an interval alone is from Kynkaanniemi et al. 2024 (arXiv 2404.07724); which ends belong to it is
as in the code of JiT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Condition, join_conditions
from pomscale.diffusion.objectives import Network
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers.types import Denoiser

N = TypeVar("N")

WeightOfTime = Callable[[float], float]
"""t -> w."""


@dataclass(frozen=True)
class Autoguided(Generic[N]):
    """A network, and the weaker one that autoguidance leads away from."""

    network: N
    guide: N


def guidance_weight(options: SamplingOptions, size: tuple[int, int]) -> float | WeightOfTime:
    """Return w, or where it depends on t a function of t that is 0 outside of the interval.

    Args:
        options: Options of sampling.
        size: (height, width) of the latents.
    """
    weight = options.guidance
    if options.guidance_base_size is not None:
        weight *= math.sqrt(math.prod(size)) / options.guidance_base_size
    if weight == 0 or (options.guidance_interval == (0, 1) and options.guidance_schedule == "constant"):
        return weight
    # Times are fp32, and an end that is among them must compare equal to it.
    low, high = (float(np.float32(end)) for end in options.guidance_interval)

    def weight_at(t: float) -> float:
        if (t <= low and low > 0) or (t >= high and high < 1):
            return 0.0
        match options.guidance_schedule:
            case "constant":
                return weight
            case "linear":
                return weight * 2 * (1 - t)
            case "cosine":
                return weight * (1 + math.cos(math.pi * t))

    return weight_at


def guided(
    network: Network | Autoguided[Network],
    condition: Condition,
    null_condition: Condition,
    weight: float | WeightOfTime,
) -> Denoiser:
    """Return the network as a function of (x, t) alone, with the conditions of a batch bound and guidance applied.

    Where the weight is 0 only the conditional prediction is evaluated. Elsewhere both halves are evaluated in one
    batch, the conditional one first; a guide is asked for itself. weight = diffusers' `guidance_scale` - 1.
    """
    if isinstance(network, Autoguided):
        main, guide = network.network, network.guide
    else:
        main, guide = network, None
    if weight == 0:
        return lambda x, t: main(x, t, condition)
    both = join_conditions([condition, null_condition])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        w = weight(float(t[0])) if callable(weight) else weight  # a sampler has one t for its batch
        if w == 0:
            return main(x, t, condition)
        if guide is None:
            good, worse = main(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        else:
            good, worse = main(x, t, condition), guide(x, t, condition)
        return good + w * (good - worse)

    return denoise
