"""Pictures that a trained model generates: picture i is the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.codecs.base import Codec
from pomscale.codecs.extractors.base import weights_identity
from pomscale.config.hardware import Precision
from pomscale.config.time_shift import time_shift
from pomscale.diffusion.options import SamplingChanges, SamplingOptions
from pomscale.evaluation.generated.crops import crop_of_training
from pomscale.evaluation.generated.picture_sets import QUANTISATION, Batch, to_pixels
from pomscale.pretrained.load import PretrainedDiPoM, load_pretrained
from pomscale.pretrained.weights import TrainedWeights, open_weights
from pomscale.runs.layout import CHECKPOINTS_FOLDER, RECIPE_FILE
from pomscale.sampling.api import decode, sample_latents
from pomscale.sampling.guides import check_guide

_MOST_DOWNSAMPLING = 64

LabelRule = Literal["balanced", "random", "none"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A trained model, and the machine's device and weights to use with it; see `load_pretrained`.

    weights: None = the average that stands for the model, or the weights as last trained where there is none.
    guide: A weaker model for autoguidance; see `pomscale.sample`.
    """

    path: Path
    weights: str | None = None
    device: str = "auto"
    codec_path: str | None = None
    precision: Precision = "fp32"
    compile: bool = False
    guide: Path | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """The pictures that are drawn.

    Attributes:
        num: Number of pictures.
        seed: Picture i has this seed plus i.
        labels: "balanced": picture i is of class number i modulo the number of classes; "random": its class is drawn
            with its own seed, evenly; "none": of no class.
        classes: Classes that are drawn; () = all of the model.
        changes: Options of sampling that differ from the recipe's.
    """

    num: int = 50_000
    seed: int = 0
    labels: LabelRule = "balanced"
    classes: tuple[int, ...] = ()
    changes: SamplingChanges = field(default_factory=SamplingChanges)


class GeneratedPictures:
    """Pictures of a model, of which any process may make any part."""

    has_captions = False

    def __init__(self, source: ModelSource, drawing: Drawing) -> None:
        """Load the model and its codec.

        Raises:
            InputError: There is no such model, set of weights, codec or class, or it makes clips.
        """
        self.name = str(source.path)
        self._source, self._drawing = source, drawing
        self._weights = open_weights(source.path)
        card = self._weights.card
        if card.model.kind != "image":
            raise InputError(f"{source.path}: this model makes clips, and pictures are measured")
        if drawing.classes and drawing.labels == "none":
            raise InputError(f"{source.path}: --classes and --labels none: pictures of no class have none of these")
        self._set = _weights_to_use(self._weights, source.weights)
        options = SamplingOptions.from_recipe(card.sampling, **drawing.changes)
        shift = time_shift(card.diffusion, card.model, card.model.latent_shape)
        self._options = options.resolved(card.diffusion.objective, shift)
        self._model = _Hashed.load(self._weights.folder, self._set, source)
        self._guide = None if source.guide is None else _Hashed.load(source.guide, "ema", source)
        if self._guide is not None:
            check_guide(self._model.network, self._guide.network, self._options)
        codec = self._model.network.codec
        self.num_pictures = drawing.num
        self.num_channels = codec.num_channels_in
        self.size: tuple[int, ...] | None = _pixel_size(codec, card.model.latent_shape)
        self._num_classes = self._model.network.config.num_classes
        self._classes = _checked_classes(source.path, drawing.classes, self._num_classes)

    @property
    def crop(self) -> dict[str, Any] | None:
        """The crop of the training pictures, which the generated ones are to be like."""
        return crop_of_training(self._weights.provenance.get("data") or [])

    def identity(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        provenance = self._weights.provenance
        drawn = list(self._drawing.classes)
        return {
            "checkpoint": {
                "path": str(self._weights.folder.resolve()),
                "run": provenance.get("run"),
                "samples": provenance.get("samples"),
                "average": {"name": self._set, "sha256": self._model.sha256},
            },
            "sampling": self._options.settings(),
            "guide": None if self._guide is None else {"path": str(self._source.guide), "sha256": self._guide.sha256},
            "drawn": {
                "number": self.num_pictures,
                "seed": self._drawing.seed,
                "labels": self._drawing.labels,
                "classes": drawn or self._num_classes,
            },
            "dtype": self._source.precision,
            "compile": self._source.compile,
            "quantisation": QUANTISATION,
        }

    @property
    def run(self) -> tuple[Path, int] | None:
        """The run folder whose checkpoint this is, and the samples that it has seen; None where it lies elsewhere."""
        folder, samples = self._weights.folder.absolute(), self._weights.provenance.get("samples")
        run = folder.parent.parent
        if samples is None or folder.parent.name != CHECKPOINTS_FOLDER or not (run / RECIPE_FILE).is_file():
            return None
        return run, int(samples)

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures, drawn and decoded batch by batch."""
        for first in range(begin, end, batch):
            numbers = list(range(first, min(first + batch, end)))
            seeds = [self._drawing.seed + number for number in numbers]
            labels = self.labels_of(numbers)
            with torch.inference_mode():
                guide = None if self._guide is None else self._guide.network
                latents = sample_latents(self._model.network, labels, seeds, self._options, batch=batch, guide=guide)
                pixels = to_pixels(self.name, decode(self._model.network, latents))
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


def _weights_to_use(weights: TrainedWeights, wanted: str | None) -> str:
    """Return the name of the set of weights. InputError if an average is asked for, and there is none."""
    if weights.card.averages:
        return weights.resolve(wanted or "ema")
    if wanted == "ema":
        raise InputError(
            f"{weights.folder}: has no average of the weights (the recipe's ema.averages are empty); "
            f"measure the weights as last trained with --weights model"
        )
    if wanted is None:
        warn(f"{weights.folder}: has no average of the weights; those as last trained are measured")
    return weights.resolve(wanted or "model")


class _Hashed(NamedTuple):
    """A network ready to sample from, and the hash of its weights in fp32."""

    network: PretrainedDiPoM
    sha256: str

    @classmethod
    def load(cls, path: Path, weights: str, source: ModelSource) -> _Hashed:
        """Load the weights at `path`, with device, precision and codec of `source`."""
        network = load_pretrained(path, weights=weights, device=source.device, codec_path=source.codec_path)
        if not isinstance(network, PretrainedDiPoM):
            raise InputError(f"{path}: this model makes clips, and pictures are measured")
        sha256 = weights_identity("network", dict(network.named_parameters()))
        if source.precision == "bf16":
            network.to(torch.bfloat16)
        if source.compile:
            network.compile()
        return cls(network, sha256)


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
