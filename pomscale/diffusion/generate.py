"""Generate latents from noise: all frames at once, perhaps with the first frames given."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.diffusion.draws import StepNoise
from pomscale.diffusion.guidance import Autoguided, guidance_weight, guided
from pomscale.diffusion.objectives import Network, Objective, interpolate
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import build_sampler
from pomscale.diffusion.samplers.types import Denoiser
from pomscale.diffusion.time_grids import sampling_times, start_of


@torch.no_grad()
def generate(
    objective: Objective,
    network: Network | Autoguided[Network],
    noise: Tensor,
    condition: Condition,
    null_condition: Condition,
    options: SamplingOptions = SamplingOptions(),  # noqa: B008  frozen
    *,
    known: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Return normalised latents (b, ...) fp32, on the device of the noise.

    With the noise of `sampling_noise` and `step_noise` they do not depend on batch size, number of ranks or the
    device's generator.

    Args:
        objective: What the network was trained to predict.
        network: The network, perhaps with a guide.
        noise: (b, ...) fp32; clips are (b c F H W), with all frames drawn at once.
        condition: Conditions of the b samples.
        null_condition: b conditions that say nothing, for guidance.
        options: Sampler, steps and guidance.
        known: (b c f H W), the first f frames of the clips, where they are given.
        step_noise: Noise of each step, for a stochastic sampler.

    Raises:
        InputError: The options do not fit the objective.
        ValueError: The sampler is stochastic, and there is no `step_noise`.
    """
    options = options.resolved(objective.name)
    height, width = noise.shape[-2:]
    denoise = guided(network, condition, null_condition, guidance_weight(options, (height, width)))
    return draw_latents(objective, denoise, noise, options, known=known, step_noise=step_noise)


def draw_latents(
    objective: Objective,
    denoise: Denoiser,
    noise: Tensor,
    options: SamplingOptions,
    *,
    known: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Do what `generate` says with resolved options, and a network that has its conditions and guidance."""
    sample = build_sampler(options, step_noise)
    times = sampling_times(objective, options)
    x = start_of(objective, noise, times)
    if known is None:
        return sample(objective, denoise, x, times)
    # Samples clips (b c F H W) whose first f <= F frames are known: a picture set in motion, or a clip continued. These
    # frames start on their own path from data to noise, their prediction is replaced by what the network should say of
    # them, and the network is shown them on that path, whatever the sampler makes of them: added noise and a clamped
    # slope lead away from it. So the other frames see them noised as in training.
    known = known.to(noise)
    num_known = known.shape[2]
    eps = noise[:, :, :num_known]
    target = objective.target(known, eps)

    def denoise_others(x: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([interpolate(objective, known, eps, t).to(x), x[:, :, num_known:]], dim=2)
        return torch.cat([target, denoise(x, t)[:, :, num_known:]], dim=2)

    # At t = 1 this is the noise itself; but paths with alpha(1) = 0 in a denominator begin a little later.
    start = interpolate(objective, known, eps, times[0].to(noise.device))
    x = sample(objective, denoise_others, torch.cat([start, x[:, :, num_known:]], dim=2), times)
    return torch.cat([known, x[:, :, num_known:]], dim=2)  # as given, to the last bit
