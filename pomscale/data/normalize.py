"""The one place where latents, stored unscaled, become what a network learns from."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pomscale.shards.schema import Normalization


def normalize(latents: Tensor, normalization: Normalization) -> Tensor:
    """(latents - mean) / std by channel: (b, c, ...) float16 or float32 -> (b, c, ...) float32, on the same device.

    Best called where the network is: as they are stored, latents take half the bytes on the way to it.
    """
    size = (-1, *[1] * (latents.ndim - 2))
    mean, std = _on_device(normalization, latents.device)
    return (latents.float() - mean.view(size)) / std.view(size)


# Kept, since a copy from the host at every step would wait for all that the device has been given to do.
@functools.lru_cache(maxsize=16)
def _on_device(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std, (c,) float32 each."""
    return torch.tensor(normalization.mean, device=device), torch.tensor(normalization.std, device=device)
