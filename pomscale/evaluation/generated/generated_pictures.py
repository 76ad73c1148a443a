"""Pictures that a trained model generates: picture i is the same on any number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.codecs.base import Codec
from pomscale.evaluation.generated.picture_sets import Batch, to_pixels
from pomscale.evaluation.generated.prompts import DrawnPrompts
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource, TrainedModel
from pomscale.pretrained.load import PretrainedDiPoM
from pomscale.sampling.api import decode, sample_latents
from pomscale.sampling.guides import check_guide
from pomscale.sampling.pictures import latent_size

_MOST_DOWNSAMPLING = 64


class GeneratedPictures(ABC):
    """Pictures of a model, of which any process may make any part."""

    has_captions = False
    frames = None
    fps = None

    def __init__(self, source: ModelSource, drawing: Drawing) -> None:
        """Load the model and its codec.

        Raises:
            InputError: There is no such model, set of weights or codec, or it makes clips.
        """
        self.name = str(source.path)
        self._drawing = drawing
        self.model = TrainedModel(source, drawing.changes, PretrainedDiPoM)
        network = self.model.network
        self._latent_size = self._of_latents(network)
        self._options = self.model.options_of((network.config.latent_shape[0], *self._latent_size))
        if self.model.guide is not None:
            check_guide(network, self.model.guide, self._options)
        self.num_pictures = drawing.num
        self.num_channels = network.codec.num_channels_in
        self.size: tuple[int, ...] | None = drawing.size or _pixel_size(network.codec, network.config.latent_shape)

    def _of_latents(self, network: PretrainedDiPoM) -> tuple[int, int]:
        """Return the latent (height, width) of the pictures."""
        if self._drawing.size is None:
            _, height, width = network.config.latent_shape
            return height, width
        return latent_size(network, self._drawing.size)

    @property
    def crop(self) -> dict[str, Any] | None:
        return self.model.crop

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        drawn = {"number": self.num_pictures, "seed": self._drawing.seed}
        return {**self.model.settings(self._options), "drawn": {**drawn, **self._settings()}}

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return JSON that says what the pictures are to show."""

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures, drawn and decoded batch by batch."""
        for first in range(begin, end, batch):
            yield self._batch(list(range(first, min(first + batch, end))))

    @abstractmethod
    def _batch(self, numbers: list[int]) -> Batch:
        """Draw some pictures."""

    @torch.inference_mode()
    def _pixels(self, numbers: Sequence[int], condition: list[int] | Text) -> Tensor:
        """Draw and decode some pictures -> (b 1|3 h w) uint8."""
        model, seeds = self.model, [self._drawing.seed + number for number in numbers]
        size = None if self._drawing.size is None else self._latent_size
        latents = sample_latents(
            model.network, condition, seeds, self._options, batch=len(seeds), guide=model.guide, size=size
        )
        return to_pixels(self.name, decode(model.network, latents))


class PicturesOfClasses(GeneratedPictures):
    """Pictures of a model that is conditioned on classes."""

    def __init__(self, source: ModelSource, drawing: Drawing) -> None:
        """Load the model and its codec.

        Raises:
            InputError: There is no such model, set of weights, codec or class, or it makes clips.
        """
        if drawing.classes and drawing.labels == "none":
            raise InputError(f"{source.path}: --classes and --labels none: pictures of no class have none of these")
        super().__init__(source, drawing)
        num_classes = self.model.network.config.num_classes
        assert num_classes is not None, "opening.py looks at the card"
        self._num_classes = num_classes
        self._classes = _checked_classes(source.path, drawing.classes, num_classes)

    def _settings(self) -> dict[str, Any]:
        drawing = self._drawing
        return {"labels": drawing.labels, "classes": list(drawing.classes) or self._num_classes}

    def _batch(self, numbers: list[int]) -> Batch:
        labels = self.labels_of(numbers)
        return Batch(numbers, self._pixels(numbers, labels), None if self._drawing.labels == "none" else labels)

    def labels_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the class ids of some pictures."""
        classes = self._classes
        if self._drawing.labels == "none":
            return [self._num_classes] * len(numbers)
        if self._drawing.labels == "balanced":
            return [classes[number % len(classes)] for number in numbers]
        uniforms = keyed_uniforms(0, Stream.SAMPLE_LABEL, self._drawing.seed + np.asarray(numbers))
        return [classes[int(uniform * len(classes))] for uniform in uniforms]


class PicturesOfTexts(GeneratedPictures):
    """Pictures of a model that is conditioned on texts; the prompts are their captions."""

    has_captions = True

    def __init__(self, source: ModelSource, drawing: Drawing) -> None:
        """Load the model, its codec and its text encoder.

        Raises:
            InputError: There is no such model, set of weights, codec or text encoder, or no prompt, or it makes clips.
        """
        super().__init__(source, drawing)
        prompts = drawing.prompts or self.model.card.sampling.prompts
        self._prompts = DrawnPrompts(self.name, "pictures", prompts, self.model.network.text_encoder)

    def _settings(self) -> dict[str, Any]:
        size = {} if self._drawing.size is None else {"size": list(self._drawing.size)}
        return {"text_encoder": self.model.card.texts.identity, "prompts": self._prompts.settings(), **size}

    def _batch(self, numbers: list[int]) -> Batch:
        prompts = self._prompts.of(numbers)
        return Batch(numbers, self._pixels(numbers, self._prompts.embedded(prompts)), captions=prompts)


def _pixel_size(codec: Codec, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return (height, width) of the pictures whose latents have this shape."""
    for factor in range(1, _MOST_DOWNSAMPLING + 1):
        size = tuple(factor * side for side in latent_shape[1:])
        try:
            if codec.latent_shape(*size) == latent_shape:
                return size
        except InputError:  # no multiple of what the codec takes
            continue
    raise InputError(f"codec {codec.name}: no size of pictures has latents of shape {latent_shape}")


def _checked_classes(path: Path, classes: Sequence[int], num_classes: int) -> list[int]:
    if any(not 0 <= label < num_classes for label in classes):
        raise InputError(f"{path}: classes {list(classes)} are asked for, and the model has 0..{num_classes - 1}")
    return list(classes) or list(range(num_classes))
