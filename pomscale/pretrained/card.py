"""The model card: everything that must travel with weights to use them.

It is stored in every checkpoint and exported folder, and attached to every loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pomscale import __version__
from pomscale.base.errors import InputError
from pomscale.codecs import build_codec, build_text_encoder
from pomscale.codecs.base import ClipCodec, Codec, TextEncoder
from pomscale.config.codecs import CodecConfig
from pomscale.config.model import ModelConfig, VideoModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.text import TextEncoderConfig
from pomscale.config.train import DiffusionConfig, TrainRecipe
from pomscale.data.mixture import Mixture
from pomscale.shards.schema import Normalization, TextInfo

DEFAULT_FPS = 16.0
"""Frames per second of clips from a model that was trained on pictures only."""


class ModelCard(BaseModel):
    """The network, its diffusion process, and the codec of its latents; no data paths or schedules."""

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    codec: CodecConfig
    codec_identity: str | None
    """Identity of the codec's weights; None = unknown (imported model): any codec of the kind is accepted."""
    class_names: tuple[str, ...]
    """Names in the order of class ids; empty = not known."""
    text: TextInfo | None = None
    """The text encoders of the captions, for a network that is conditioned on texts."""
    fps: float | None = None
    """Frames per second of the training clips; None = there were none."""
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    averages: tuple[str, ...]
    """Names of the averages of the weights; the first, if any, stands for the model."""

    @classmethod
    def of(cls, recipe: TrainRecipe, mixture: Mixture) -> ModelCard:
        """Return the card of the model that `recipe` trains on `mixture`."""
        manifest, normalization = mixture.datasets[0].manifest, mixture.normalization
        return cls(
            model=recipe.model,
            diffusion=recipe.diffusion,
            sampling=recipe.sampling,
            codec=recipe.codec,
            codec_identity=manifest.latent_codec.identity,
            class_names=manifest.class_names,
            text=None if mixture.text is None else mixture.text.info,
            fps=mixture.fps,
            latent_mean=normalization.mean,
            latent_std=normalization.std,
            averages=tuple(recipe.ema.averages),
        )

    @classmethod
    def read(cls, folder: Path, meta: Mapping[str, Any]) -> ModelCard:
        """Read the card in the JSON of a checkpoint or exported folder. Raise InputError if it has another format."""
        try:
            return cls.model_validate(meta["card"])
        except ValidationError as error:
            raise InputError(
                f"{folder}: written by pomscale {meta['versions']['pomscale']}; this version ({__version__}) does "
                f"not understand {error.errors()[0]['loc']} in its card; use that version"
            ) from error

    @property
    def for_use(self) -> ModelCard:
        """The card without what serves training alone: the projection of the alignment loss."""
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"alignment": None}),
                "diffusion": self.diffusion.model_copy(update={"alignment": None}),
            }
        )

    @property
    def main_weights(self) -> str:
        """Name of the weights that stand for the model, and are sampled from, measured and exported by default."""
        return self.averages[0] if self.averages else "model"

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of the training latents by channel."""
        return Normalization(self.latent_mean, self.latent_std)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Turn normalised latents (b c ...), which the network sees, into unscaled ones, which the codec decodes."""
        size = (-1, *[1] * (latents.ndim - 2))
        mean, std = (latents.new_tensor(v).view(size) for v in (self.latent_mean, self.latent_std))
        return latents * std + mean

    @property
    def texts(self) -> TextInfo:
        """The text encoder of the captions, for a network that is known to be conditioned on texts."""
        assert self.text is not None
        return self.text

    def load_text_encoder(self, device: torch.device) -> TextEncoder:
        """Load the text encoders of the training captions. Raise InputError if one is missing or has other weights."""
        configs = [encoder.config for encoder in self.texts.encoders]
        if self.sampling.text_path is not None:
            configs = _moved(configs, self.sampling.text_path)
        remedy = "Where the right ones lie: sampling.text_path in a recipe, --text-path when sampling"
        try:
            encoder = build_text_encoder(*configs).to(device)
        except InputError as error:
            raise InputError(f"{error}. {remedy}") from error
        for part, then in zip(encoder.parts, self.texts.encoders, strict=True):
            if part.identity() != then.identity:
                raise InputError(
                    f"text encoder {part.config.path}: its weights are not those that the model was trained with, so "
                    f"it would not understand. {remedy}"
                )
        return encoder

    def load_codec(self, device: torch.device) -> Codec:
        """Load the codec of the training latents. Raise InputError if it is missing or has other weights."""
        remedy = "Where the right ones lie: codec.path in a recipe, --codec-path when sampling"
        try:
            codec = build_codec(self.codec).to(device)
        except InputError as error:
            raise InputError(f"{error}. {remedy}") from error
        if isinstance(self.model, VideoModelConfig) and not isinstance(codec, ClipCodec):
            raise InputError(
                f"codec.path: codec {codec.name} in {getattr(self.codec, 'path', 'the recipe')!r} takes pictures, and "
                f"model.kind is video; name an autoencoder of clips. {remedy}"
            )
        if self.codec_identity is not None and codec.identity() != self.codec_identity:
            raise InputError(
                f"codec {codec.name}: its weights are not those that made the training latents, so pictures would "
                f"come out wrong. {remedy}"
            )
        return codec


def _moved(configs: list[TextEncoderConfig], path: str) -> list[TextEncoderConfig]:
    """Return sections of text encoders that lie in another folder now: each in its subfolder of it."""
    if len(configs) > 1 and len({config.subfolder for config in configs}) < len(configs):
        paths = ", ".join(config.path for config in configs)
        raise InputError(
            f"sampling.text_path: {path} is one folder, and the model's {len(configs)} text encoders lie in several: "
            f"{paths}; put them there again, or encode with subfolders of one"
        )
    return [config.model_copy(update={"path": path}) for config in configs]
