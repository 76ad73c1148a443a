"""Generation with the work shared over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pomscale.base.condition import Condition, batch_size, map_condition
from pomscale.config.sampling import SamplingConfig
from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import Network, Objective
from pomscale.diffusion.options import SamplingOptions
from pomscale.distributed.world import World

DEFAULT_NUM_ROWS = 8


def grid_classes(config: SamplingConfig, num_classes: int) -> list[int]:
    """Return the class of every picture in the grid, one row per class, for a model of `num_classes`."""
    num_rows = config.num_classes or min(num_classes, DEFAULT_NUM_ROWS)
    return [c for c in range(num_rows) for _ in range(config.num_each)]


def generate_on_all_ranks(
    objective: Objective,
    network: Network,
    shape: tuple[int, ...],
    condition: Condition,
    null_condition: Condition,
    config: SamplingConfig,
    world: World,
    group_frames: int | None = None,
) -> Tensor:
    """Generate samples on all ranks; a collective.

    Sample i has seed config.seed + i on whichever rank it is generated, so the result does not depend on the world
    size.

    Args:
        objective: The objective that the network was trained with.
        network: The network, maybe sharded over the ranks.
        shape: Shape of one sample's latents.
        condition: n conditions.
        null_condition: One condition that says nothing.
        config: Options and first seed.
        world: The ranks.
        group_frames: For clips, the latent frames of a frame group.

    Returns:
        Normalised latents (n, *shape) fp32 on the CPU of every rank.
    """
    num_samples = batch_size(condition)
    per_rank = -(-num_samples // world.size)
    # Every rank computes the same number of samples, since a sharded network computes on all ranks or on none.
    positions = [min(world.rank * per_rank + i, num_samples - 1) for i in range(per_rank)]
    mine = map_condition(condition, lambda part: part[positions].to(world.device))
    seeds = [config.seed + position for position in positions]
    latents = generate(
        objective,
        network,
        sampling_noise(seeds, shape, mine, group_frames),
        mine,
        map_condition(null_condition, lambda part: part[[0] * per_rank].to(world.device)),
        SamplingOptions.from_recipe(config),
        step_noise=step_noise(seeds, shape, mine, group_frames),
    )
    parts: list[Any] = world.gather(latents.cpu())
    return torch.cat(parts)[:num_samples]
