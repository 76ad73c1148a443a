"""Trained weights on disk: of a run, a checkpoint or an exported folder, read in one way; and exported folders made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint, read_meta, read_tensors
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.models import make_model
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.exported import Exported, groups, is_exported, read_exported, write_exported
from pomscale.runs.code_state import versions

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedWeights:
    """One or more sets of weights of one network. `sets`: "model" (as last trained) and names of averages.

    `provenance` is JSON: where they come from.
    """

    folder: Path
    card: ModelCard
    sets: tuple[str, ...]
    provenance: Mapping[str, Any]
    _read: Callable[[str, dict[str, Tensor], bool], None]

    def resolve(self, weights: str) -> str:
        """The name of a set; "ema" is the one that stands for the model. Raises InputError if there is none."""
        name = self.card.main_weights if weights == "ema" else weights
        if name not in self.sets:
            raise InputError(f"{self.folder}: has no weights {weights!r}; there are: ema, {', '.join(self.sets)}")
        return name

    def read(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors`, fp32 on the CPU, in place with parameters of a set. InputError if they are damaged."""
        self._read(name, tensors, True)

    def check(self, name: str) -> None:
        """Reads every byte of what holds the set. InputError if any is damaged."""
        self._read(name, {}, True)

    def stream(self, name: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a set, fp32 on the CPU, in the order of `shapes`, without holding all of them.

        What is damaged is not noticed here: call `check` before.
        """
        for group in groups(shapes):
            tensors = {key: torch.empty(tuple(shape)) for key, shape in group.items()}
            self._read(name, tensors, False)
            yield from tensors.items()


def open_weights(path: Path) -> TrainedWeights:
    """The weights that `path` means: those of an exported folder, a checkpoint, or a run's newest checkpoint.

    Raises InputError if there are none, or this version of pomscale cannot read them.
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


def write_weights(
    out: Path,
    card: ModelCard,
    provenance: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    sets: Mapping[str, Iterable[Tensor]],
    precision: Precision = "fp32",
) -> None:
    """Make the exported folder `out`; sets: tensors in the order of `shapes`, taken one by one.

    Raises InputError if there is something at `out` already, PomscaleError if the disk is full.
    """
    meta = {"card": card.model_dump(mode="json"), "provenance": provenance, "versions": versions()}
    write_exported(out, meta, shapes, sets, _DTYPES[precision])


def parameter_shapes(config: ImageModelConfig | VideoModelConfig) -> dict[str, torch.Size]:
    """By name, in the order of the module."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in make_model(config).named_parameters()}


def _read_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], check: bool) -> None:
    read_tensors(folder, {"model": tensors} if name == "model" else {"ema": {name: tensors}}, check=check)


def _read_exported(exported: Exported, name: str, tensors: dict[str, Tensor], check: bool) -> None:
    exported.read(name, tensors)  # every tensor has its own checksum: no need to be told when to check
