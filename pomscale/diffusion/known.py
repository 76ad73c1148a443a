"""Sampling where the first frames are given: a picture that is to move, a clip that is to go on."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.diffusion.objectives import Objective, interpolate
from pomscale.diffusion.samplers.types import Denoiser, Sampler


def sample_after(
    known: Tensor, sample: Sampler, objective: Objective, denoise: Denoiser, noise: Tensor, times: Tensor
) -> Tensor:
    """Known (b c f H W), noise (b c F H W), f <= F -> clips (b c F H W) whose first f frames are `known`.

    The known frames start on their own path from data to noise, and their prediction is replaced by what the network
    should say of them. Every sampler then keeps them on that path, so the other frames see them noised as in training.
    """
    num_known = known.shape[2]
    target = objective.target(known, noise[:, :, :num_known])

    def denoise_others(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([target, denoise(x, t)[:, :, num_known:]], dim=2)

    # At t = 1 this is the noise itself; but paths with alpha(1) = 0 in a denominator begin a little later.
    start = interpolate(objective, known, noise[:, :, :num_known], times[0].to(noise.device))
    x = sample(objective, denoise_others, torch.cat([start, noise[:, :, num_known:]], dim=2), times)
    return torch.cat([known, x[:, :, num_known:]], dim=2)  # as given, to the last bit
