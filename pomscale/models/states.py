"""Carried states as plain tensors with names, so that another process can continue a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from pomscale.config.mixer import AttentionMixer, Mixer
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
    """Invert `states_to_tensors`, for a network of this config.

    Raises ValueError for the states of another network: other tensors, or another width. The two forms of PoM may
    have states of one width, so who stores a state stores with it of which network it is.
    """
    states: list[MixerState] = []
    expected: set[str] = set()
    for block, mixer in enumerate(config.mixers):
        kind = AttentionState if isinstance(mixer, AttentionMixer) else PomState
        # A form is no tensor.
        names = {field.name: f"{block}.{field.name}" for field in fields(kind) if field.name != "form"}
        expected |= set(names.values())
        if not expected <= tensors.keys():
            raise ValueError(f"state of block {block}: expected {sorted(names.values())}, got {sorted(tensors)}")
        _check_width(block, mixer, config.dim, tensors)
        parts = [tensors[name] for name in names.values()]
        states.append(kind(*parts))  # type: ignore[arg-type]  # the fields that are tensors come first
    if tensors.keys() != expected:
        raise ValueError(
            f"states: expected those of {config.depth} blocks, got also {sorted(tensors.keys() - expected)}"
        )
    return states


def _check_width(block: int, mixer: Mixer, dim: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the state of a block has the width that its mixer gives it."""
    if isinstance(mixer, AttentionMixer):
        key, heads = tensors[f"{block}.key"], mixer.heads
        if key.shape[1:2] + key.shape[3:] != (heads, dim // heads):
            raise ValueError(
                f"state of block {block}: expected keys (b {heads} n {dim // heads}), got {tuple(key.shape)}"
            )
        return
    total = tensors[f"{block}.sum"]
    if total.shape[1:] != (mixer.width(dim),):
        raise ValueError(f"state of block {block}: expected a sum (b {mixer.width(dim)}), got {tuple(total.shape)}")
