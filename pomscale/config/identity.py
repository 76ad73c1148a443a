"""Fields of a recipe that must stay as they are for the whole of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pomscale.config.mixer import mixers_of_recipe

# A change of these would change the samples, the noise, the network or its averages.
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
    ("training", "global_tokens"),
)

# Settings of a model that nothing but its mixers depends on.
_OF_MIXERS = frozenset({"mixer", "degree", "expand", "num_heads"})

# Settings of a codec that its latents do not depend on: where the weights lie, the arithmetic of the encoder, and the
# lossless coding of what is stored.
NOT_OF_THE_LATENTS = frozenset({"path", "subfolder", "precision", "tiling", "coding"})


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the fixed fields in which two recipes of one run differ, one line each.

    Args:
        then: recipe with which the run began, as `model_dump(mode="json")` gives it.
        now: recipe with which it is to continue.
    """
    if mixers_of_recipe(then["model"]) == mixers_of_recipe(now["model"]):  # they may be written in several ways
        then, now = (
            {**recipe, "model": {key: value for key, value in recipe["model"].items() if key not in _OF_MIXERS}}
            for recipe in (then, now)
        )
    return [
        line
        for keys in _FIXED_FOR_A_RUN
        for line in values_that_differ(".".join(keys), _at(then, keys), _at(now, keys))
    ]


def values_that_differ(name: str, then: Any, now: Any) -> Iterator[str]:
    """Yield a line for each field that differs, down to single values, which people can find in a recipe."""
    if then == now:
        return
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        yield f"{name}: {then} then, {now} now"
        return
    # Of two kinds of section, all other fields differ as well.
    kinds = [key for key in ("kind", "name") if then.get(key) != now.get(key)]
    for key in kinds or dict.fromkeys([*then, *now]):
        yield from values_that_differ(f"{name}.{key}" if name else key, then.get(key), now.get(key))


def _at(recipe: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the value at `keys`; of a codec, only the settings that its latents depend on."""
    value: Any = recipe
    for key in keys:
        value = value.get(key)
    return {k: v for k, v in value.items() if k not in NOT_OF_THE_LATENTS} if keys == ("codec",) else value
