"""Generate latents from noise: all frames at once, perhaps with the first frames given."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.objectives import Network, Objective, interpolate
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS
from pomscale.diffusion.samplers.types import Denoiser, Sampler


@torch.no_grad()
def generate(
    objective: Objective,
    network: Network,
    noise: Tensor,
    condition: Condition,
    null_condition: Condition,
    options: SamplingOptions = SamplingOptions(),  # noqa: B008  frozen
    *,
    known: Tensor | None = None,
) -> Tensor:
    """Return normalised latents (b, ...) fp32, on the device of the noise.

    With the noise of `sampling_noise` they do not depend on batch size, number of ranks or the device's generator.

    Args:
        objective: What the network was trained to predict.
        network: The network.
        noise: (b, ...) fp32; clips are (b c F H W), with all frames drawn at once.
        condition: Conditions of the b samples.
        null_condition: b conditions that say nothing, for guidance.
        options: Sampler, steps and guidance.
        known: (b c f H W), the first f frames of the clips, where they are given.
    """
    denoise = guided(network, condition, null_condition, options.guidance)
    sample = SAMPLERS[options.sampler or DEFAULT_SAMPLER[objective.name]]
    times = objective.time_grid(options.num_steps).float()
    if known is None:
        return sample(objective, denoise, noise, times)
    return sample_after(known.to(noise), sample, objective, denoise, noise, times)


def sample_after(
    known: Tensor, sample: Sampler, objective: Objective, denoise: Denoiser, noise: Tensor, times: Tensor
) -> Tensor:
    """Sample clips (b c F H W) whose first f <= F frames are `known`: a picture set in motion, or a clip continued.

    The known frames start on their own path from data to noise, and their prediction is replaced by what the network
    should say of them. Every sampler then keeps them on that path, so the other frames see them noised as in training.

    Args:
        known: (b c f H W).
        sample: The sampler.
        objective: What the network predicts.
        denoise: The network with its conditions.
        noise: (b c F H W).
        times: Times of the sampler's steps.
    """
    num_known = known.shape[2]
    target = objective.target(known, noise[:, :, :num_known])

    def denoise_others(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([target, denoise(x, t)[:, :, num_known:]], dim=2)

    # At t = 1 this is the noise itself; but paths with alpha(1) = 0 in a denominator begin a little later.
    start = interpolate(objective, known, noise[:, :, :num_known], times[0].to(noise.device))
    x = sample(objective, denoise_others, torch.cat([start, noise[:, :, num_known:]], dim=2), times)
    return torch.cat([known, x[:, :, num_known:]], dim=2)  # as given, to the last bit
