"""Trained weights on disk: read from a run, a checkpoint or an exported folder in one way, and written as a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint, read_meta, read_tensors
from pomscale.config.hardware import Precision
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.models import make_model
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.exported import Exported, groups, is_exported, read_exported, write_exported
from pomscale.runs.code_state import versions

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedWeights:
    """One or more sets of weights of one network.

    `sets` names them: "model" (the weights as last trained) and averages. `provenance` is JSON and says what they were
    made from.
    """

    folder: Path
    card: ModelCard
    sets: tuple[str, ...]
    provenance: Mapping[str, Any]
    _read: Callable[[str, dict[str, Tensor], bool], None]

    def resolve(self, weights: str) -> str:
        """Return the name of a set; "ema" is the set that stands for the model. Raise InputError if there is none."""
        name = self.card.main_weights if weights == "ema" else weights
        if name not in self.sets:
            raise InputError(f"{self.folder}: has no weights {weights!r}; there are: ema, {', '.join(self.sets)}")
        return name

    def read(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors`, fp32 on the CPU, in place with parameters of a set. Raise InputError if they are damaged."""
        self._read(name, tensors, True)

    def check(self, name: str) -> None:
        """Read every byte of the files of the set. Raise InputError if any is damaged."""
        self._read(name, {}, True)

    def stream(self, name: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of a set, fp32 on the CPU, in the order of `shapes`, without holding all of them.

        Damage is not noticed here: call `check` before.
        """
        for group in groups(shapes):
            tensors = {key: torch.empty(tuple(shape)) for key, shape in group.items()}
            self._read(name, tensors, False)
            yield from tensors.items()


def open_weights(path: Path) -> TrainedWeights:
    """Open the weights of an exported folder, of a checkpoint, or of the newest checkpoint of a run.

    Raises:
        InputError: There are none at `path`, or this version of pomscale cannot read them.
    """
    if is_exported(path):
        exported = read_exported(path)
        card = ModelCard.read(path, exported.meta)
        return TrainedWeights(path, card, exported.sets, exported.meta["provenance"], partial(_read_exported, exported))
    folder = find_checkpoint(path)
    meta = read_meta(folder)
    card = ModelCard.read(folder, meta)
    provenance = {
        "run": meta["recipe"]["name"],
        "checkpoint": str(folder.resolve()),
        "samples": meta["samples"],
        "data": meta["data"],
        "versions": meta["versions"],
    }
    return TrainedWeights(folder, card, (*card.averages, "model"), provenance, partial(_read_checkpoint, folder))


def export(path: Path, out: Path, *, weights: str = "ema", dtype: Precision = "fp32") -> None:
    """Write one set of weights of a run, a checkpoint or an exported folder to the new folder `out`.

    The set stands for the model in `out`. In fp32 the loaded model gives bit-equal outputs. The projection of the
    alignment loss, which serves training alone, is left out.

    Args:
        path: The run folder, checkpoint or exported folder.
        out: The folder to make.
        weights: The set to write, named as for `load_pretrained`.
        dtype: "fp32" or "bf16".

    Raises:
        InputError: There are no such weights at `path`, or something exists at `out` already.
    """
    source = open_weights(path)
    name = source.resolve(weights)
    source.check(name)
    card = source.card.for_use.model_copy(update={"averages": () if name == "model" else (name,)})
    shapes = parameter_shapes(card.model)
    tensors = (tensor for _, tensor in source.stream(name, shapes))
    write_weights(out, card, {**source.provenance, "weights": name}, shapes, {name: tensors}, dtype)


def write_weights(
    out: Path,
    card: ModelCard,
    provenance: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    sets: Mapping[str, Iterable[Tensor]],
    precision: Precision = "fp32",
) -> None:
    """Make the exported folder `out`.

    Args:
        out: The folder to make.
        card: The card of the network.
        provenance: JSON that says what the weights were made from.
        shapes: Shapes of the parameters by name.
        sets: Tensors of each set in the order of `shapes`; they are taken one by one.
        precision: The dtype that they are stored in.

    Raises:
        InputError: Something exists at `out` already.
        PomscaleError: The disk is full.
    """
    meta = {"card": card.model_dump(mode="json"), "provenance": provenance, "versions": versions()}
    write_exported(out, meta, shapes, sets, _DTYPES[precision])


def parameter_shapes(config: ImageModelConfig | VideoModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter by name, in the order of the module."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in make_model(config).named_parameters()}


def _read_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], check: bool) -> None:
    read_tensors(folder, {"model": tensors} if name == "model" else {"ema": {name: tensors}}, check=check)


def _read_exported(exported: Exported, name: str, tensors: dict[str, Tensor], check: bool) -> None:
    exported.read(name, tensors)  # every tensor has its own checksum, so `check` makes no difference
