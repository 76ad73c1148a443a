"""The codec without weights: latents are the pixels, folded by space-to-depth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pomscale.base.errors import InputError
from pomscale.codecs.base import ClipDecoder
from pomscale.codecs.clip_decoders import FramewiseDecoder
from pomscale.config.codecs import PixelCodecConfig


class PixelCodec:
    """Space-to-depth of 2x - 1, frame by frame. The decode of latents stored in fp16 is exact for 8-bit pixels."""

    name = "pixel"
    scaling_factor = 1.0
    shift = 0.0
    stored_dtype: Literal["float16"] = "float16"
    stores_moments = False
    needs_noise = False
    latent_batch = 1  # latent frames that are decoded together
    continues = True

    def __init__(self, config: PixelCodecConfig) -> None:
        self.config = config
        self.num_channels_in: int = config.channels
        self.factor: int = config.block
        self.device = torch.device("cpu")

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        *frames, height, width = size
        block = self.config.block
        if height % block or width % block:
            raise InputError(
                f"codec pixel: {height}x{width} pixels cannot be folded into blocks of {block}x{block}; "
                f"set transform.size, sizes or buckets to multiples of codec.block"
            )
        return self.config.channels * block * block, *frames, height // block, width // block

    def num_pixel_frames(self, latent_frames: int) -> int:
        return latent_frames

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        self.latent_shape(*images.shape[2:])
        return self._fold(2.0 * images.to(self.device, torch.float32) - 1.0, pixel_unshuffle)

    def decode(self, latents: Tensor) -> Tensor:
        images = self._fold(latents.to(self.device, torch.float32), pixel_shuffle)
        return ((images + 1.0) / 2.0).clamp(0.0, 1.0)

    def decoder(self, latent_frames: int) -> ClipDecoder:
        return FramewiseDecoder(self.decode)

    def identity(self) -> str:
        return hashlib.sha256(f"pixel block={self.config.block} channels={self.config.channels}".encode()).hexdigest()

    def to(self, device: torch.device | str) -> PixelCodec:
        self.device = torch.device(device)
        return self

    def _fold(self, x: Tensor, shuffle: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Apply `shuffle` to (b c h w), or to (b c f h w) with every frame by itself."""
        if x.ndim == 4:
            return shuffle(x, self.config.block)
        return shuffle(x.transpose(1, 2), self.config.block).transpose(1, 2)
