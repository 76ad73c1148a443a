"""The codec without weights: latents are the pixels, folded by space-to-depth."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pomscale.config.schema import PixelCodecConfig
from pomscale.errors import InputError


class PixelCodec:
    """x -> space-to-depth of 2x - 1. The decode of latents stored in fp16 is exact for 8-bit pictures."""

    name = "pixel"
    scaling_factor = 1.0
    shift = 0.0
    stores_moments = False
    needs_noise = False

    def __init__(self, config: PixelCodecConfig) -> None:
        self.config = config
        self.num_channels_in: int = config.channels
        self.device = torch.device("cpu")

    def latent_shape(self, *size: int) -> tuple[int, int, int]:
        height, width = size
        block = self.config.block
        if height % block or width % block:
            raise InputError(
                f"codec pixel: {height}x{width} pixels cannot be folded into blocks of {block}x{block}; "
                f"set transform.size, sizes or buckets to multiples of codec.block"
            )
        return self.config.channels * block * block, height // block, width // block

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        self.latent_shape(*images.shape[2:])
        return pixel_unshuffle(2.0 * images.to(self.device, torch.float32) - 1.0, self.config.block)

    def decode(self, latents: Tensor) -> Tensor:
        images = pixel_shuffle(latents.to(self.device, torch.float32), self.config.block)
        return ((images + 1.0) / 2.0).clamp(0.0, 1.0)

    def identity(self) -> str:
        return hashlib.sha256(f"pixel block={self.config.block} channels={self.config.channels}".encode()).hexdigest()

    def to(self, device: torch.device | str) -> PixelCodec:
        self.device = torch.device(device)
        return self
