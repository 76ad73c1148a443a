"""Everything random about training on one sample, keyed by its global position.

Drawn on the CPU (in the loader's threads), so that the numbers are the same on every device and layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.config.train import DiffusionConfig, TimeConfig


@dataclass
class Draws:
    """eps (b, ...) fp32; t (b,), or (b, g) with one per frame group, fp32 in (0, 1); drop_condition (b,) bool;
    start (b,) int64, the number of a clip's first frame group."""

    eps: Tensor
    t: Tensor
    drop_condition: Tensor
    start: Tensor


def keyed_normal(seed: int, stream: Stream, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal (len(indices), *shape) fp32; row i depends on (seed, stream, indices[i]) alone."""
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices, strict=True):
        keyed_generator(seed, stream, index).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def draw_time(config: TimeConfig, generator: np.random.Generator) -> float:
    """One t: uniform, or logit-normal (Esser et al. 2024, equation 19)."""
    if config.distribution == "uniform":
        return float(generator.random())
    return float(1 / (1 + np.exp(-generator.normal(config.mean, config.std))))


def draw(
    seed: int, positions: list[int], shape: tuple[int, ...], config: DiffusionConfig, num_groups: int = 1
) -> Draws:
    """All that is random about the samples at global `positions`; shape is one sample's latent shape.

    num_groups: frame groups of a clip.
    """
    num_times = num_groups if config.time.per_frame_group else 1
    times = [
        draw_time(config.time, keyed_generator(seed, Stream.TIME, position, subindex=group))
        for position in positions
        for group in range(num_times)
    ]
    t = torch.tensor(times, dtype=torch.float32)
    return Draws(
        eps=keyed_normal(seed, Stream.NOISE, positions, shape),
        t=t.view(len(positions), num_times) if config.time.per_frame_group else t,
        drop_condition=torch.tensor(
            [keyed_generator(seed, Stream.CONDITION_DROPOUT, p).random() < config.condition_dropout for p in positions],
            dtype=torch.bool,
        ),
        start=torch.tensor(
            [keyed_generator(seed, Stream.START_GROUP, p).integers(config.max_start_group + 1) for p in positions],
            dtype=torch.int64,
        ),
    )
