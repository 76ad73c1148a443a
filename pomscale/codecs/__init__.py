"""Codecs: networks that turn pictures, clips and captions into latents and embeddings, and latents back."""

from __future__ import annotations

import logging

from pomscale.base.imports import large_imports
from pomscale.codecs.base import Codec, TextEncoder
from pomscale.codecs.pixel import PixelCodec
from pomscale.codecs.uint8 import Uint8Codec
from pomscale.config.codecs import (
    CodecConfig,
    PixelCodecConfig,
    Uint8CodecConfig,
)
from pomscale.config.text import TextEncoderConfig

__all__ = ["Codec", "TextEncoder", "build_codec", "build_text_encoder"]

# diffusers and transformers import torchao where it is installed, which logs all kernels that are not for this machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# diffusers and transformers are optional and take seconds to import: their adapters are imported where they are built.
# ruff: noqa: PLC0415


def build_codec(config: CodecConfig) -> Codec:
    """Return the codec that a recipe names, on the CPU, ready to encode and decode.

    Raises InputError where its weights or the package that runs them are missing.
    """
    if isinstance(config, PixelCodecConfig):
        return PixelCodec(config)
    if isinstance(config, Uint8CodecConfig):
        return Uint8Codec(config)
    with large_imports():
        from pomscale.codecs.vae import open_vae

    return open_vae(config)


def build_text_encoder(config: TextEncoderConfig, *beside: TextEncoderConfig) -> TextEncoder:
    """Return a text encoder, or several side by side, on the CPU. Raises InputError as `build_codec` does."""
    with large_imports():
        from pomscale.codecs.text.encoder import PretrainedTextEncoder
    if not beside:
        return PretrainedTextEncoder(config)
    from pomscale.codecs.text.joint import JointTextEncoder

    return JointTextEncoder([PretrainedTextEncoder(one) for one in (config, *beside)])
