"""Generation with the work shared over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pomscale.config.schema import SamplingConfig
from pomscale.diffusion.generate import generate
from pomscale.diffusion.loss import Network
from pomscale.diffusion.objectives import Objective
from pomscale.distributed.world import World

DEFAULT_NUM_ROWS = 8


def grid_classes(config: SamplingConfig, num_classes: int) -> list[int]:
    """Class of every picture in the grid, one row per class, for a model of `num_classes`."""
    num_rows = config.num_classes or min(num_classes, DEFAULT_NUM_ROWS)
    return [c for c in range(num_rows) for _ in range(config.num_per_class)]


def generate_on_all_ranks(
    objective: Objective,
    network: Network,
    shape: tuple[int, ...],
    classes: list[int],
    null_class: int,
    config: SamplingConfig,
    world: World,
) -> Tensor:
    """Normalised latents (len(classes), *shape) fp32 on the CPU of every rank. A collective.

    Picture i has seed config.seed + i, whatever rank draws it, so the result does not depend on the world size.
    """
    per_rank = -(-len(classes) // world.size)
    # Every rank computes the same number of pictures, since a sharded network computes on all ranks or on none.
    places = [min(world.rank * per_rank + i, len(classes) - 1) for i in range(per_rank)]
    condition = torch.tensor([classes[p] for p in places], device=world.device)
    latents = generate(
        objective,
        network,
        shape,
        condition,
        torch.full_like(condition, null_class),
        [config.seed + p for p in places],
        sampler=config.sampler,
        num_steps=config.num_steps,
        guidance=config.guidance,
    )
    parts: list[Any] = world.gather(latents.cpu())
    return torch.cat(parts)[: len(classes)]
