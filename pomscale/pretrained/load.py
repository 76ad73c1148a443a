"""Load trained models with everything that sampling and decoding need."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from pomscale.codecs.base import ClipCodec, Codec, TextEncoder
from pomscale.config.codecs import PixelCodecConfig, Uint8CodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.distributed.world import resolve_device
from pomscale.models import DiPoM, VDiPoM
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.weights import open_weights


class PretrainedDiPoM(DiPoM):
    """A DiPoM with its card, which names the objective, the normalisation, the codec, and a text encoder if any."""

    def __init__(self, card: ModelCard) -> None:
        assert isinstance(card.model, ImageModelConfig)
        super().__init__(card.model)
        self.card = card

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedModel:
        """Call `load_pretrained`; other libraries use this name."""
        return load_pretrained(path, **options)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the training latents, on the model's device; raises InputError as ModelCard.load_codec."""
        return self.card.load_codec(self.head.weight.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder of the training captions, for a network of texts, on its device.

        Raises InputError as ModelCard.load_text_encoder.
        """
        return self.card.load_text_encoder(self.head.weight.device)


class PretrainedVDiPoM(VDiPoM):
    """A V-DiPoM with its card, which names the text encoder too."""

    def __init__(self, card: ModelCard) -> None:
        assert not isinstance(card.model, ImageModelConfig)
        super().__init__(card.model)
        self.card = card

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedModel:
        """Call `load_pretrained`; other libraries use this name."""
        return load_pretrained(path, **options)

    @cached_property
    def codec(self) -> ClipCodec:
        """The codec of the training latents, on the model's device; raises InputError as ModelCard.load_codec."""
        # A recipe that combines clips with a codec of pictures is refused.
        return cast(ClipCodec, self.card.load_codec(self.head.weight.device))

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder of the training captions, on the model's device.

        Raises InputError as ModelCard.load_text_encoder.
        """
        return self.card.load_text_encoder(self.head.weight.device)


PretrainedModel: TypeAlias = PretrainedDiPoM | PretrainedVDiPoM


def load_pretrained(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    codec_path: str | None = None,
    text_path: str | None = None,
) -> PretrainedModel:
    """Load a trained model in fp32 and eval mode, without the projection of the alignment loss.

    Args:
        path: A run folder (its newest complete checkpoint), a checkpoint, or an exported folder.
        weights: "ema" (the average that stands for the model), "model" (the weights as last trained) or the name of an
            average, such as "halflife-500000" or "power-0.05".
        device: "auto", "cpu" or "cuda".
        codec_path: Location of the codec's weights on this machine, if it is not the same as in training.
        text_path: Location of the text encoder's weights on this machine, if it is not the same as in training.

    Returns:
        The model, with its card.

    Raises:
        InputError: There are no such weights at `path`, or they are damaged.
    """
    source = open_weights(Path(path))
    card = source.card.for_use
    if codec_path is not None and not isinstance(card.codec, PixelCodecConfig | Uint8CodecConfig):
        card = card.model_copy(update={"codec": card.codec.model_copy(update={"path": codec_path})})
    if text_path is not None:
        card = card.model_copy(update={"sampling": card.sampling.model_copy(update={"text_path": text_path})})
    with torch.device("meta"):
        model = PretrainedDiPoM(card) if isinstance(card.model, ImageModelConfig) else PretrainedVDiPoM(card)
    model.to_empty(device="cpu")
    source.read(source.resolve(weights), {name: p.detach() for name, p in model.named_parameters()})
    return model.requires_grad_(False).eval().to(resolve_device(device))
