"""Stable Diffusion's image VAE: a thin adapter on diffusers' AutoencoderKL."""

from __future__ import annotations

from pomscale.base.errors import InputError
from pomscale.codecs.diffusers_vae import AutoencoderKL, DiffusersVae
from pomscale.config.codecs import SdVaeCodecConfig


class SdVaeCodec(DiffusersVae):
    """Codec of pictures (b, 3, H, W) and latents (b, c, H / 8, W / 8); the factor is that of the network's config."""

    name = "sd_vae"
    own_arithmetic_keys = ("mid_block_add_attention",)
    decode_batch = 8

    def __init__(self, config: SdVaeCodecConfig) -> None:
        super().__init__(config, AutoencoderKL)
        self.config = config

    def latent_shape(self, *size: int) -> tuple[int, int, int]:
        height, width = size
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise InputError(
                f"codec sd_vae: {height}x{width} pixels are not a multiple of {factor}, the codec's downsampling; "
                f"change transform.size, sizes or buckets"
            )
        return self.vae.config.latent_channels, height // factor, width // factor
