"""Latents from seeds: the same picture whatever the batch size, the number of ranks or the device's generator."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.diffusion.draws import keyed_normal
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.loss import Network
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS
from pomscale.keyed_random import Stream


@torch.no_grad()
def generate(
    objective: Objective,
    network: Network,
    shape: tuple[int, ...],
    condition: Tensor,
    null_condition: Tensor,
    seeds: list[int],
    *,
    sampler: str | None = None,
    num_steps: int = 50,
    guidance: float = 0.0,
) -> Tensor:
    """Normalised latents (b, *shape) fp32 for condition (b,) and one seed per sample.

    sampler None follows the objective: euler for flow, ddim for eps.
    """
    noise = torch.cat([keyed_normal(seed, Stream.SAMPLING_NOISE, [0], shape) for seed in seeds])
    denoise = guided(network, condition, null_condition, guidance)
    sample = SAMPLERS[sampler or DEFAULT_SAMPLER[objective.name]]
    return sample(objective, denoise, noise.to(condition.device), objective.time_grid(num_steps).float())
