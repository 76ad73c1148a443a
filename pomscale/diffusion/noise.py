"""The noise that generation starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pomscale.condition import Condition, Text
from pomscale.diffusion.draws import keyed_normal
from pomscale.keyed_random import Stream


def sampling_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    condition: Condition,
    group_frames: int | None = None,
    first_group: int = 0,
) -> Tensor:
    """Standard normal (b, *shape) fp32, one seed per sample, on the device of their conditions.

    Clips, shape (c F H W): group_frames latent frames are a frame group, and each group has noise of its own, keyed by
    its number, the first one's being `first_group`. So a clip is the same, drawn at once or group by group.
    """
    device = (condition.mask if isinstance(condition, Text) else condition).device
    if group_frames is None:
        return torch.cat([keyed_normal(seed, Stream.SAMPLING_NOISE, [0], shape) for seed in seeds]).to(device)
    channels, num_frames, height, width = shape
    frames = min(group_frames, num_frames)  # a picture does not fill a group
    groups = list(range(first_group, first_group + num_frames // frames))
    group_shape = (channels, frames, height, width)
    noise = torch.stack([keyed_normal(seed, Stream.SAMPLING_NOISE, groups, group_shape) for seed in seeds])
    return noise.transpose(1, 2).flatten(2, 3).to(device)  # (b g c p H W) -> (b c F H W)
