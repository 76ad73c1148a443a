"""What a run cannot change on its way, as far as its recipe says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The samples, the noise, the network or its averages would no longer be those it began with.
_FIXED_FOR_A_RUN = (
    ("seed",),
    ("codec",),
    ("model",),
    ("diffusion",),
    ("ema",),
    ("data", "normalization"),
    ("data", "flip_probability"),
    ("data", "shuffle_window"),
    ("training", "global_batch"),
)

# Settings of a codec that its latents do not depend on: where the weights lie, and the arithmetic of the encoder.
NOT_OF_THE_LATENTS = frozenset({"path", "subfolder", "precision", "tiling"})


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Between the recipes (as `model_dump(mode="json")` has them) with which a run began and is to go on."""
    return [
        f"{'.'.join(keys)}: {_at(then, keys)} then, {_at(now, keys)} now"
        for keys in _FIXED_FOR_A_RUN
        if _at(then, keys) != _at(now, keys)
    ]


def _at(recipe: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Of the codec only what its latents depend on."""
    value: Any = recipe
    for key in keys:
        value = value.get(key)
    return {k: v for k, v in value.items() if k not in NOT_OF_THE_LATENTS} if keys == ("codec",) else value
