"""Generation with the work shared over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pomscale.base.condition import Condition, batch_size, map_condition
from pomscale.config.sampling import SamplingConfig
from pomscale.diffusion.generate import generate
from pomscale.diffusion.loss import Network
from pomscale.diffusion.objectives import Objective
from pomscale.distributed.world import World

DEFAULT_NUM_ROWS = 8


def grid_classes(config: SamplingConfig, num_classes: int) -> list[int]:
    """Class of every picture in the grid, one row per class, for a model of `num_classes`."""
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
    """Normalised latents (n, *shape) fp32 on the CPU of every rank, for n conditions and one that says nothing.

    A collective. Sample i has seed config.seed + i, whatever rank draws it, so the result does not depend on the world
    size. group_frames: of clips, as in `generate`.
    """
    num_samples = batch_size(condition)
    per_rank = -(-num_samples // world.size)
    # Every rank computes the same number of samples, since a sharded network computes on all ranks or on none.
    places = [min(world.rank * per_rank + i, num_samples - 1) for i in range(per_rank)]
    latents = generate(
        objective,
        network,
        shape,
        map_condition(condition, lambda part: part[places].to(world.device)),
        map_condition(null_condition, lambda part: part[[0] * per_rank].to(world.device)),
        [config.seed + p for p in places],
        sampler=config.sampler,
        num_steps=config.num_steps,
        guidance=config.guidance,
        group_frames=group_frames,
    )
    parts: list[Any] = world.gather(latents.cpu())
    return torch.cat(parts)[:num_samples]
