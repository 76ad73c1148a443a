"""A small video model on disk, as `pomscale export` leaves one, with its codec and its text encoder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pomscale.codecs import build_text_encoder
from pomscale.config.codecs import CodecConfig, PixelCodecConfig, VaeCodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.text import TextEncoderConfig
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedModel, PretrainedVDiPoM
from pomscale.pretrained.weights import write_weights
from pomscale.shards.schema import TextInfo
from support.tiny_clips import awaken, video_config
from support.tiny_models import save_t5, save_video_vae
from support.tiny_text_pictures import text_config

TEXT_DIM = 16  # of `save_t5`
MAX_LENGTH = 12
FPS = 8.0


def save_model(
    folder: Path,
    *,
    codec: CodecConfig | None = None,
    per_frame_group: bool = False,
    sampling: dict[str, Any] | None = None,
    scale: float = 0.1,
    beside: Sequence[TextEncoderConfig] = (),
    **fields: Any,
) -> Path:
    """Exported to folder/model, its text encoder to folder/t5. By default of the pixel codec, with clips of 20x12.

    Models of other scales have other weights. `beside`: further text encoders, no wider than the first.
    """
    text = TextInfo.of([save_text_encoder(folder / "t5"), *map(_text_info, beside)])
    codec = codec or PixelCodecConfig(name="pixel", channels=3)
    channels = 4 if isinstance(codec, VaeCodecConfig) else 12
    config = video_config(
        text_dim=TEXT_DIM, **{"latent_shape": (channels, 6, 10, 6), "temporal": "block_causal"} | fields
    )
    card = ModelCard(
        model=config,
        diffusion=DiffusionConfig(time=TimeConfig(per_frame_group=per_frame_group), max_start_group=100),
        sampling=SamplingConfig.model_validate({"num_steps": 2, "num_each": 2, **(sampling or {})}),
        codec=codec,
        codec_identity=None,
        class_names=(),
        text=text,
        fps=FPS,
        latent_mean=tuple(0.01 * np.arange(channels)),
        latent_std=tuple(0.4 + 0.01 * np.arange(channels)),
        averages=(),
    )
    return _export(folder / "model", PretrainedVDiPoM(card), scale)


def save_text_encoder(folder: Path) -> TextInfo:
    """Write a byte-level T5, and return what a card says of it."""
    save_t5(folder, seed=0)
    return _text_info(TextEncoderConfig(path=str(folder), tokenizer="bytes", max_length=MAX_LENGTH, precision="fp32"))


def _text_info(config: TextEncoderConfig) -> TextInfo:
    (encoder,) = build_text_encoder(config).parts
    (null,) = encoder.encode([""])
    return TextInfo(
        config=encoder.config,
        identity=encoder.identity(),
        dim=encoder.dim,
        null_length=len(null),
        null_embedding=base64.b64encode(null.astype("<f2").tobytes()).decode(),
    )


def save_text_picture_model(
    folder: Path, *, sampling: dict[str, Any] | None = None, scale: float = 0.1, **fields: Any
) -> Path:
    """One of pictures of a text, exported to folder/model, its text encoder to folder/t5: colour pictures of 20x12."""
    config = text_config(text_dim=TEXT_DIM, latent_shape=(12, 10, 6), **fields)
    card = ModelCard(
        model=config,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig.model_validate({"num_steps": 2, "num_each": 2, **(sampling or {})}),
        codec=PixelCodecConfig(name="pixel", channels=3),
        codec_identity=None,
        class_names=(),
        text=save_text_encoder(folder / "t5"),
        latent_mean=(0.0,) * 12,
        latent_std=(0.4,) * 12,
        averages=(),
    )
    return _export(folder / "model", PretrainedDiPoM(card), scale)


def save_cogvideox_model(folder: Path, **fields: Any) -> Path:
    """Like `save_model`, with a real AutoencoderKLCogVideoX in folder/vae: clips of 40x24."""
    save_video_vae(folder / "vae", seed=0)
    codec = VaeCodecConfig(name="vae", path=str(folder / "vae"), subfolder="", precision="fp32")
    return save_model(folder, codec=codec, **fields)


def save_picture_model(folder: Path, codec: CodecConfig | None = None, scale: float = 0.1) -> Path:
    """One of classes, exported to `folder`, by default of the pixel codec: grey pictures of 8x8. scale: of weights."""
    config = ImageModelConfig(latent_shape=(4, 4, 4), num_classes=3, dim=16, depth=1, num_heads=2)
    card = ModelCard(
        model=config,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(),
        codec=codec or PixelCodecConfig(name="pixel", channels=1),
        codec_identity=None,
        class_names=(),
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        averages=(),
    )
    return _export(folder, PretrainedDiPoM(card), scale)


def _export(folder: Path, model: PretrainedModel, scale: float = 0.1) -> Path:
    awaken(model, scale)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_weights(folder, model.card, {"weights": "model"}, shapes, {"model": parameters.values()})
    return folder
