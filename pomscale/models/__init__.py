"""Networks: plain modules that know layers and their config, never how they are sharded, trained or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import TypeAdapter
from torch import Tensor

from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.layers import patchify, patchify_clips
from pomscale.models.image import DiPoM
from pomscale.models.init import init_weights, initial_value
from pomscale.models.video import MixerState, VDiPoM

__all__ = [
    "DiPoM",
    "MixerState",
    "Model",
    "VDiPoM",
    "build_model",
    "init_weights",
    "initial_value",
    "latent_tokens",
    "make_model",
]

Model: TypeAlias = DiPoM | VDiPoM
_CONFIG: TypeAdapter[ImageModelConfig | VideoModelConfig] = TypeAdapter(ModelConfig)


def make_model(config: ImageModelConfig | VideoModelConfig) -> Model:
    """Build the network of a recipe, its weights not yet set."""
    return VDiPoM(config) if isinstance(config, VideoModelConfig) else DiPoM(config)


def latent_tokens(config: ImageModelConfig | VideoModelConfig, latents: Tensor) -> Tensor:
    """Cut pictures (b c h w) or clips (b c f h w) into the tokens of the network of `config`, (b n values).

    The tokens and the order of their values are those of what the network returns where its tokens are split. A
    picture's tokens of a network of clips have the values of one frame.
    """
    size = config.patch_size
    if isinstance(config, ImageModelConfig):
        return patchify(latents, size)
    clips = latents if latents.ndim == 5 else latents[:, :, None]
    return patchify_clips(clips, (config.patch_frames if clips.shape[2] > 1 else 1, size, size))


def build_model(preset: str, *, latent_shape: Sequence[int], seed: int = 0, **changes: Any) -> Model:
    """Build a named network with initial weights on the CPU.

        build_model("dipom-xl-2", num_classes=1000, latent_shape=(4, 32, 32))           # (channels, height, width)
        build_model("vdipom-xl-2", text_dim=4096, latent_shape=(16, 20, 30, 48))        # (channels, frames, ...)

    changes are other fields of config.model.ImageModelConfig or VideoModelConfig.
    Raises pydantic.ValidationError for a name or a combination that does not exist.
    """
    model = make_model(_CONFIG.validate_python({"preset": preset, "latent_shape": tuple(latent_shape), **changes}))
    init_weights(model, seed)
    return model
