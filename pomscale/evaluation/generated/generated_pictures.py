"""Pictures that a trained model generates: picture i is the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.codecs.base import Codec
from pomscale.evaluation.generated.picture_sets import Batch, to_pixels
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource, TrainedModel
from pomscale.pretrained.load import PretrainedDiPoM
from pomscale.sampling.api import decode, sample_latents
from pomscale.sampling.guides import check_guide

_MOST_DOWNSAMPLING = 64


class GeneratedPictures:
    """Pictures of a model, of which any process may make any part."""

    has_captions = False
    frames = None
    fps = None

    def __init__(self, source: ModelSource, drawing: Drawing) -> None:
        """Load the model and its codec.

        Raises:
            InputError: There is no such model, set of weights, codec or class, or it makes clips.
        """
        self.name = str(source.path)
        self._drawing = drawing
        if drawing.classes and drawing.labels == "none":
            raise InputError(f"{source.path}: --classes and --labels none: pictures of no class have none of these")
        self.model = TrainedModel(source, drawing.changes, PretrainedDiPoM)
        network = self.model.network
        self._options = self.model.options_of(network.config.latent_shape)
        if self.model.guide is not None:
            check_guide(network, self.model.guide, self._options)
        self.num_pictures = drawing.num
        self.num_channels = network.codec.num_channels_in
        self.size: tuple[int, ...] | None = _pixel_size(network.codec, self.model.card.model.latent_shape)
        self._num_classes = network.config.num_classes
        self._classes = _checked_classes(source.path, drawing.classes, self._num_classes)

    @property
    def crop(self) -> dict[str, Any] | None:
        return self.model.crop

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        drawing = self._drawing
        return {
            **self.model.settings(self._options),
            "drawn": {
                "number": self.num_pictures,
                "seed": drawing.seed,
                "labels": drawing.labels,
                "classes": list(drawing.classes) or self._num_classes,
            },
        }

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures, drawn and decoded batch by batch."""
        for first in range(begin, end, batch):
            numbers = list(range(first, min(first + batch, end)))
            seeds = [self._drawing.seed + number for number in numbers]
            labels = self.labels_of(numbers)
            with torch.inference_mode():
                model = self.model
                latents = sample_latents(model.network, labels, seeds, self._options, batch=batch, guide=model.guide)
                pixels = to_pixels(self.name, decode(model.network, latents))
            yield Batch(numbers, pixels, None if self._drawing.labels == "none" else labels)

    def labels_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the class ids of some pictures."""
        classes = self._classes
        if self._drawing.labels == "none":
            return [self._num_classes] * len(numbers)
        if self._drawing.labels == "balanced":
            return [classes[number % len(classes)] for number in numbers]
        uniforms = keyed_uniforms(0, Stream.SAMPLE_LABEL, self._drawing.seed + np.asarray(numbers))
        return [classes[int(uniform * len(classes))] for uniform in uniforms]


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
