"""The codec of pictures as they are, a byte per value: no weights, nothing computed."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from pomscale.config.codecs import Uint8CodecConfig


class Uint8Codec:
    """Latents are the values 0 to 255 of the pixels. Normalised, (x - 127.5) / 127.5, they lie in [-1, 1]."""

    name = "uint8"
    scaling_factor = 1.0 / 127.5
    shift = 127.5
    stored_dtype: Literal["uint8"] = "uint8"
    stores_moments = False
    needs_noise = False

    def __init__(self, config: Uint8CodecConfig) -> None:
        self.config = config
        self.num_channels_in: int = config.channels
        self.device = torch.device("cpu")

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        return self.config.channels, *size

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return (255.0 * images.to(self.device, torch.float32)).round()

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.to(self.device, torch.float32) / 255.0).clamp(0.0, 1.0)

    def identity(self) -> str:
        return hashlib.sha256(f"uint8 channels={self.config.channels}".encode()).hexdigest()

    def to(self, device: torch.device | str) -> Uint8Codec:
        self.device = torch.device(device)
        return self
