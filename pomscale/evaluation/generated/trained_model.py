"""A trained model as pictures or clips are drawn from it: its weights with their hash, its options, and its guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import weights_identity
from pomscale.config.hardware import Precision
from pomscale.config.time_shift import time_shift
from pomscale.diffusion.options import SamplingChanges, SamplingOptions
from pomscale.evaluation.generated.crops import crop_of_training
from pomscale.evaluation.generated.picture_sets import QUANTISATION
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedVDiPoM, load_pretrained
from pomscale.pretrained.weights import TrainedWeights, open_weights
from pomscale.runs.layout import CHECKPOINTS_FOLDER, RECIPE_FILE

NetworkT = TypeVar("NetworkT", PretrainedDiPoM, PretrainedVDiPoM)

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
    text_path: str | None = None
    precision: Precision = "fp32"
    compile: bool = False
    guide: Path | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """The pictures or clips that are drawn.

    Attributes:
        num: Number of pictures or clips.
        seed: Number i has this seed plus i.
        labels: "balanced": picture i is of class number i modulo the number of classes; "random": its class is drawn
            with its own seed, evenly; "none": of no class.
        classes: Classes that are drawn; () = all of the model.
        changes: Options of sampling that differ from the recipe's.
        prompts: Clip i has prompt number i modulo the number of prompts; () = those of the model's recipe.
        num_frames: Frames of a drawn clip; None = as the model's recipe says.
        size: (height, width) of clips in pixels; None = that of the training clips.
    """

    num: int = 50_000
    seed: int = 0
    labels: LabelRule = "balanced"
    classes: tuple[int, ...] = ()
    changes: SamplingChanges = field(default_factory=SamplingChanges)
    prompts: tuple[str, ...] = ()
    num_frames: int | None = None
    size: tuple[int, int] | None = None


class TrainedModel(Generic[NetworkT]):
    """A model to draw from."""

    def __init__(self, source: ModelSource, changes: SamplingChanges, network: type[NetworkT]) -> None:
        """Load the model, and its guide.

        Args:
            source: The model.
            changes: Options of sampling that differ from the recipe's.
            network: The class of networks that make what is measured.

        Raises:
            InputError: There is no such model or set of weights, or it makes clips where pictures are measured.
        """
        self._source = source
        self._weights = open_weights(source.path)
        self.card = self._weights.card
        self._set = _weights_to_use(self._weights, source.weights)
        self._options = SamplingOptions.from_recipe(self.card.sampling, **changes)
        self._model: _Hashed[NetworkT] = _load(self._weights.folder, self._set, source, network)
        self._guide: _Hashed[NetworkT] | None = None
        if source.guide is not None:
            self._guide = _load(source.guide, "ema", source, network)
        self.network: NetworkT = self._model.network
        self.guide: NetworkT | None = None if self._guide is None else self._guide.network

    def options_of(self, shape: Sequence[int]) -> SamplingOptions:
        """Return all options of sampling for samples of a latent shape, (c, h, w) or (c, f, h, w)."""
        diffusion = self.card.diffusion
        return self._options.resolved(diffusion.objective, time_shift(diffusion, self.card.model, shape))

    @property
    def crop(self) -> dict[str, Any] | None:
        """The crop of the training data, which what is drawn is to be like."""
        return crop_of_training(self._weights.provenance.get("data") or [])

    @property
    def run(self) -> tuple[Path, int] | None:
        """The run folder whose checkpoint this is, and the samples that it has seen; None where it lies elsewhere."""
        folder, samples = self._weights.folder.absolute(), self._weights.provenance.get("samples")
        run = folder.parent.parent
        if samples is None or folder.parent.name != CHECKPOINTS_FOLDER or not (run / RECIPE_FILE).is_file():
            return None
        return run, int(samples)

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Return JSON that says what the model is and how it is sampled from, but not what is drawn."""
        provenance = self._weights.provenance
        return {
            "checkpoint": {
                "path": str(self._weights.folder.resolve()),
                "run": provenance.get("run"),
                "samples": provenance.get("samples"),
                "average": {"name": self._set, "sha256": self._model.sha256},
            },
            "sampling": options.settings(),
            "guide": None if self._guide is None else {"path": str(self._source.guide), "sha256": self._guide.sha256},
            "dtype": self._source.precision,
            "compile": self._source.compile,
            "quantisation": QUANTISATION,
        }


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


class _Hashed(NamedTuple, Generic[NetworkT]):
    """A network ready to sample from, and the hash of its weights in fp32."""

    network: NetworkT
    sha256: str


def _load(path: Path, weights: str, source: ModelSource, network_class: type[NetworkT]) -> _Hashed[NetworkT]:
    """Load the weights at `path`, with device, precision, codec and text encoder of `source`."""
    network = load_pretrained(
        path, weights=weights, device=source.device, codec_path=source.codec_path, text_path=source.text_path
    )
    if not isinstance(network, network_class):
        kinds = ("clips", "pictures") if network_class is PretrainedDiPoM else ("pictures", "clips")
        raise InputError(f"{path}: this model makes {kinds[0]}, and {kinds[1]} are measured")
    sha256 = weights_identity("network", dict(network.named_parameters()))
    if source.precision == "bf16":
        network.to(torch.bfloat16)
    if source.compile:
        network.compile()
    return _Hashed(network, sha256)
