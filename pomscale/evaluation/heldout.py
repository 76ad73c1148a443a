"""Held-out loss by time bin, with noise fixed once and for all.

Loss at a given t hardly moves by chance when noise and t are the same at every evaluation, so small progress
shows; and a mean over all t would hide that easy and hard times move differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomscale.base.condition import Condition, map_condition
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.config.schema import ValidationConfig
from pomscale.diffusion.draws import keyed_normal
from pomscale.diffusion.objectives import Network, Objective, per_sample_loss
from pomscale.distributed.world import World

ReadRecords = Callable[[list[int]], tuple[Tensor, Condition, Tensor]]
"""Places in the held-out set, all of one shape -> (normalised latents (b, ...) fp32, condition, weights (b,) fp32), on
the CPU.

Weight 0: the record cannot be read, and what stands for it does not count. Otherwise 1.
"""


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean over all samples that could be read, and per time bin (bin 0 is nearest to the data; None if none could)."""

    mean: float
    by_bin: list[float | None]
    num_bad: int


@torch.no_grad()
def heldout_loss(
    objective: Objective,
    network: Network,
    read: ReadRecords,
    sizes: Sequence[int],
    config: ValidationConfig,
    world: World,
) -> HeldoutLoss:
    """The loss of `config.num_samples` held-out samples. A collective: all ranks share the work.

    sizes: how many samples have the first shape, the second, and so on; the first of each are taken, and of each its
    share. The sample at place i always falls in bin i mod num_time_bins, at the same t (in a clip the same for all
    frames) and with the same noise. InputError if none of the samples can be read.
    """
    num_samples, num_bins = min(config.num_samples, sum(sizes)), config.num_time_bins
    batches = _batches(sizes, num_samples, config.batch)
    sums = torch.zeros(2, num_bins, dtype=torch.float64)  # loss and weight by bin
    for first in range(0, len(batches), world.size):
        # A sharded network computes on all ranks or on none: a rank that has run out repeats sample 0, uncounted.
        indices = batches[first + world.rank] if first + world.rank < len(batches) else []
        latents, condition, weights = read(indices or [0])
        latents, condition = latents.to(world.device), map_condition(condition, lambda part: part.to(world.device))
        loss = _fixed_loss(objective, network, latents, condition, indices or [0], config).double().cpu()
        if indices:
            bins, weights = torch.tensor(indices) % num_bins, weights.double()
            sums.index_add_(1, bins, torch.stack([loss * weights, weights]))
    flat = world.sum(sums.flatten().tolist())
    losses, counts = flat[:num_bins], flat[num_bins:]
    num_read = round(sum(counts))
    if num_read == 0:
        raise InputError(f"validation: none of the {num_samples:,} held-out samples can be read; repair the dataset")
    by_bin = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
    last_place = batches[-1][-1]
    return HeldoutLoss(sum(losses) / num_read, by_bin[: last_place + 1], num_samples - num_read)


def _batches(sizes: Sequence[int], num_samples: int, batch: int) -> list[list[int]]:
    """`num_samples` places, at most `batch` together and only those of one shape."""
    batches, first, taken = [], 0, 0
    for size in sizes:
        up_to_here = num_samples * (first + size) // sum(sizes)
        end = first + up_to_here - taken
        batches += [list(range(start, min(start + batch, end))) for start in range(first, end, batch)]
        first, taken = first + size, up_to_here
    return batches


def _fixed_loss(
    objective: Objective,
    network: Network,
    x0: Tensor,
    condition: Condition,
    indices: list[int],
    config: ValidationConfig,
) -> Tensor:
    """Per-sample loss (b,) with time and noise keyed by the place in the held-out set."""
    jitter = [keyed_generator(config.seed, Stream.VALIDATION_NOISE, i, subindex=1).random() for i in indices]
    bins = torch.tensor(indices) % config.num_time_bins
    t = ((bins + torch.tensor(jitter, dtype=torch.float64)) / config.num_time_bins).float()
    eps = keyed_normal(config.seed, Stream.VALIDATION_NOISE, indices, tuple(x0.shape[1:]))
    return per_sample_loss(objective, network, x0, eps.to(x0.device), t.to(x0.device), condition)
