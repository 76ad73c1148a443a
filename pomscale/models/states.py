"""Carried states as plain tensors with names, so that another process can continue a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from pomscale.config.model import VideoModelConfig
from pomscale.layers import AttentionState
from pomscale.models.video import MixerState
from pomscale.ops.pom import PomState


def states_to_tensors(states: Sequence[MixerState]) -> dict[str, Tensor]:
    """Name the states of all blocks, as `VDiPoM.step` returns them: BLOCK.FIELD -> the tensor itself, not a copy."""
    return {
        f"{block}.{field.name}": getattr(state, field.name)
        for block, state in enumerate(states)
        for field in fields(state)
        if isinstance(getattr(state, field.name), Tensor)
    }


def states_from_tensors(config: VideoModelConfig, tensors: Mapping[str, Tensor]) -> list[MixerState]:
    """Invert `states_to_tensors`, for a network of this config. Raises KeyError if a tensor is missing."""
    states: list[MixerState] = []
    for block, name in enumerate(config.mixers):
        of_block = {key.removeprefix(f"{block}."): part for key, part in tensors.items() if key.startswith(f"{block}.")}
        if name == "attention":
            states.append(AttentionState(of_block["key"], of_block["value"], of_block["takes_part"]))
        else:
            states.append(PomState(of_block["sum"], of_block["count"]))
    return states
