"""The noise that generation starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pomscale.base.condition import Condition, device_of
from pomscale.base.keyed_random import Stream
from pomscale.diffusion.draws import keyed_normal


def sampling_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    condition: Condition,
    group_frames: int | None = None,
    first_group: int = 0,
) -> Tensor:
    """Standard normal (b, *shape) fp32, one seed per sample, on the device of their conditions.

    Clips, shape (c F H W): group_frames latent frames are a frame group, and each group has noise of its own, keyed by
    its number, the first one's being `first_group`. So a clip is the same, drawn at once or group by group. ValueError
    if the groups do not fill the clip; a single frame, a picture, does not have to.
    """
    device = device_of(condition)
    if group_frames is None:
        return torch.cat([keyed_normal(seed, Stream.SAMPLING_NOISE, [0], shape) for seed in seeds]).to(device)
    channels, num_frames, height, width = shape
    frames = 1 if num_frames == 1 else group_frames
    if num_frames % frames:
        raise ValueError(f"clips of {num_frames} latent frames cannot be cut into groups of {frames}")
    groups = list(range(first_group, first_group + num_frames // frames))
    group_shape = (channels, frames, height, width)
    noise = torch.stack([keyed_normal(seed, Stream.SAMPLING_NOISE, groups, group_shape) for seed in seeds])
    return noise.transpose(1, 2).flatten(2, 3).to(device)  # (b g c p H W) -> (b c F H W)
