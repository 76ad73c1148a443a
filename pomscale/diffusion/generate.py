"""Latents from seeds: the same whatever the batch size, the number of ranks or the device's generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.known import sample_after
from pomscale.diffusion.loss import Network
from pomscale.diffusion.noise import sampling_noise
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS


@torch.no_grad()
def generate(
    objective: Objective,
    network: Network,
    shape: tuple[int, ...],
    condition: Condition,
    null_condition: Condition,
    seeds: Sequence[int],
    *,
    sampler: str | None = None,
    num_steps: int = 50,
    guidance: float = 0.0,
    group_frames: int | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Normalised latents (b, *shape) fp32 for b conditions and one seed per sample, on the device of the conditions.

    sampler None follows the objective: euler for flow, ddim for eps. Clips, shape (c F H W), have all frames drawn at
    once; group_frames: latent frames of a frame group; known (b c f H W): their first f frames, which are given.
    """
    noise = sampling_noise(seeds, shape, condition, group_frames)
    denoise = guided(network, condition, null_condition, guidance)
    sample = SAMPLERS[sampler or DEFAULT_SAMPLER[objective.name]]
    times = objective.time_grid(num_steps).float()
    if known is None:
        return sample(objective, denoise, noise, times)
    return sample_after(known.to(noise), sample, objective, denoise, noise, times)
