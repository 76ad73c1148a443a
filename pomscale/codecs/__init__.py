"""Codecs: what turns pictures into latents and back."""

from __future__ import annotations

from pomscale.codecs.base import Codec
from pomscale.codecs.pixel import PixelCodec
from pomscale.config.schema import CodecConfig, PixelCodecConfig

__all__ = ["Codec", "build_codec"]


def build_codec(config: CodecConfig) -> Codec:
    """The codec that a recipe names, on the CPU, ready to encode and decode.

    Raises InputError where its weights or the package that runs them are missing.
    """
    if isinstance(config, PixelCodecConfig):
        return PixelCodec(config)
    from pomscale.codecs.sd_vae import SdVaeCodec  # noqa: PLC0415  diffusers is optional and takes seconds to import

    return SdVaeCodec(config)
