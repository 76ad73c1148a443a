"""Draw all random numbers of training, keyed by global position, and of sampling, keyed by seed.

Drawn on the CPU (for training in the loader's threads), so that they are the same on every device and layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Condition, device_of
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.config.train import DiffusionConfig, TimeConfig


@dataclass
class Draws:
    """Random numbers of a batch in training.

    Attributes:
        eps: Noise (b, ...) fp32.
        t: Times (b,), or (b, g) with one per frame group, fp32 in (0, 1).
        drop_condition: Whether a sample is trained without its condition, (b,) bool.
        start: Number of a clip's first frame group, (b,) int64.
        dropout_seeds: Seeds of dropout, see `dropout_seeds`; None = there is none.
    """

    eps: Tensor
    t: Tensor
    drop_condition: Tensor
    start: Tensor
    dropout_seeds: Tensor | None = None


StepNoise = Callable[[int], Tensor]
"""Number of a step, from 0 on -> the noise (b, ...) fp32 that a stochastic sampler adds in it."""


def keyed_normal(seed: int, stream: Stream, indices: list[int], shape: tuple[int, ...], subindex: int = 0) -> Tensor:
    """Return standard normal (len(indices), *shape) fp32.

    Row i depends on (seed, stream, indices[i], subindex) alone.
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices, strict=True):
        keyed_generator(seed, stream, index, subindex).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def dropout_seeds(seed: int, positions: list[int]) -> Tensor:
    """Return a seed of dropout for the sample at each global position, (b,) int64 from 0 to 2^31 - 1."""
    return torch.tensor([int(keyed_generator(seed, Stream.DROPOUT, p).integers(2**31)) for p in positions])


def draw_time(config: TimeConfig, generator: np.random.Generator) -> float:
    """Draw one t: uniform, or logit-normal (Esser et al. 2024, equation 19)."""
    if config.distribution == "uniform":
        return float(generator.random())
    return float(1 / (1 + np.exp(-generator.normal(config.mean, config.std))))


def shifted_time(t: float, shift: float) -> float:
    """Return the t of flow matching at which noise over data is `shift` times that at t (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw(
    seed: int,
    positions: list[int],
    shape: tuple[int, ...],
    config: DiffusionConfig,
    num_groups: int = 1,
    shift: float | None = None,
) -> Draws:
    """Draw the random numbers of the samples at some global positions.

    Args:
        seed: Seed of the run.
        positions: Global positions of the b samples.
        shape: Latent shape of one sample.
        config: Distributions of times and of dropped conditions.
        num_groups: Frame groups of a clip.
        shift: Shift of the times by resolution, see config.time_shift; None = they stay as they are drawn.
    """
    num_times = num_groups if config.time.per_frame_group else 1
    times = [
        draw_time(config.time, keyed_generator(seed, Stream.TIME, position, subindex=group))
        for position in positions
        for group in range(num_times)
    ]
    if shift is not None:
        times = [shifted_time(time, shift) for time in times]
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


def sampling_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    condition: Condition,
    group_frames: int | None = None,
    first_group: int = 0,
    step: int | None = None,
) -> Tensor:
    """Return the noise that sampling starts from: standard normal (b, *shape) fp32, on the device of the conditions.

    Each frame group of a clip has noise of its own, keyed by its number, so a clip is the same drawn at once or group
    by group. Raises ValueError if the groups do not fill the clip; a single frame, a picture, need not fill one.

    Args:
        seeds: One seed per sample.
        shape: Shape of a sample; (c F H W) of a clip.
        condition: Conditions of the samples.
        group_frames: Latent frames of a frame group, for clips.
        first_group: Number of the first frame group.
        step: Number of a step, for the noise that a stochastic sampler adds in it.
    """
    device = device_of(condition)
    stream, subindex = (Stream.SAMPLING_NOISE, 0) if step is None else (Stream.SAMPLING_STEP_NOISE, step)
    if group_frames is None:
        return torch.cat([keyed_normal(seed, stream, [0], shape, subindex) for seed in seeds]).to(device)
    channels, num_frames, height, width = shape
    frames = 1 if num_frames == 1 else group_frames
    if num_frames % frames:
        raise ValueError(f"clips of {num_frames} latent frames cannot be cut into groups of {frames}")
    groups = list(range(first_group, first_group + num_frames // frames))
    group_shape = (channels, frames, height, width)
    noise = torch.stack([keyed_normal(seed, stream, groups, group_shape, subindex) for seed in seeds])
    return noise.transpose(1, 2).flatten(2, 3).to(device)  # (b g c p H W) -> (b c F H W)


def step_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    condition: Condition,
    group_frames: int | None = None,
    first_group: int = 0,
) -> StepNoise:
    """Return the noise of every step of a stochastic sampler; arguments and keys as of `sampling_noise`."""
    return lambda step: sampling_noise(seeds, shape, condition, group_frames, first_group, step)
