"""Checkpoints of other code, read without executing anything in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pomscale.base.errors import InputError

COMPILED = "_orig_mod."
"""torch.compile's part of a name."""


class _Ignored:
    """An inert stand-in for every object in a checkpoint that is not a tensor or plain data."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_foreign(file: Path) -> Any:
    """Return the content of a file of torch.save, its tensors mapped from the file.

    Nothing in the file is executed: objects that are not tensors or plain data, such as the state of callbacks, become
    inert. Raise InputError if the file cannot be read so.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        inert: list[Any] = [(type("_Ignored", (_Ignored,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: cannot be read as a checkpoint of torch.save, or not safely: {reason}") from error


def check_numbers(file: Path, sets: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise InputError for weights, by set and name, that are no floating-point numbers, or not finite."""
    for set_name, tensors in sets.items():
        for name, value in tensors.items():
            if not value.is_floating_point():
                raise InputError(f"{file}: {set_name}: {name} is of {value.dtype}, which no weights are of")
            if value.is_meta:
                raise InputError(
                    f"{file}: {set_name}: {name} is on the meta device: a shape that was saved without values"
                )
            if not value.isfinite().all():
                raise InputError(f"{file}: {set_name}: {name} holds values that are not finite; its training diverged")


def check_axes(file: Path, tensors: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Raise InputError unless those of the tensors that `axes` names have as many axes, none of which is empty."""
    for name, num_axes in axes.items():
        if name in tensors and (tensors[name].dim() != num_axes or 0 in tensors[name].shape):
            shape = tuple(tensors[name].shape)
            raise InputError(f"{file}: {name} has the shape {shape}, expected {num_axes} axes of at least 1")
