"""Normalise latents, which are stored unscaled. No other code does so."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pomscale.shards.schema import Normalization


def normalize(latents: Tensor, normalization: Normalization) -> Tensor:
    """Return (latents - mean) / std by channel, float32, of (b, c, ...) of any type, on the same device.

    Call it on the network's device: as they are stored, latents take half the bytes on the way there, pixels a quarter.
    """
    size = (-1, *[1] * (latents.ndim - 2))
    mean, std = _on_device(normalization, latents.device)
    return (latents.float() - mean.view(size)) / std.view(size)


# Cached, since a copy from the host at every step would wait for all queued work of the device.
@functools.lru_cache(maxsize=16)
def _on_device(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std, (c,) float32 each."""
    return torch.tensor(normalization.mean, device=device), torch.tensor(normalization.std, device=device)
