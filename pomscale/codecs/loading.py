"""Networks of others as they are loaded: what does not fit is said in few words, and they are placed on a device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain

import torch
from torch import nn

from pomscale.base.errors import InputError

_MOST_NAMES = 3
_MOST_CHARACTERS = 500


def brief(error: Exception) -> str:
    """Return the beginning of an error's text: those of diffusers and transformers name every tensor of a network."""
    text = str(error).strip()
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS].rstrip()} ..."


def check_fits(key: str, folder: str, misfits: Mapping[str, Collection[object]]) -> None:
    """Raise InputError, which names recipe key, folder and some tensors, if any tensors do not fit a config.json.

    Args:
        key: Key of the recipe.
        folder: Folder of config.json and weights.
        misfits: Tensors by what is wrong with them ("missing", "unexpected" ...).
    """
    told = []
    for kind, found in misfits.items():
        names = sorted(map(str, found))
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        if names:
            told.append(f"{kind} {', '.join(names[:_MOST_NAMES])}{more}")
    if told:
        raise InputError(
            f"{key}: the weights in {folder!r} do not fit its config.json: {'; '.join(told)}. "
            f"Get them again; the copy is incomplete or of another model"
        )


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to `device`, with weights that no longer depend on the files they were read from.

    safetensors maps its files into memory: on the CPU, what is written into them later, as a copy over them does, would
    be in the weights, and in all latents from then on.
    """
    network.to(device)
    if device.type == "cpu":
        for tensor in chain(network.parameters(), network.buffers()):
            tensor.data = tensor.data.clone()
