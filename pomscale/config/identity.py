"""Fields of a recipe that must stay as they are for the whole of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pomscale.config.codecs import current_codec
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
    then, now = dict(then), dict(now)
    then["codec"], now["codec"] = settings_of_latents(then["codec"], now["codec"])
    return [
        line
        for keys in _FIXED_FOR_A_RUN
        for line in values_that_differ(".".join(keys), _at(then, keys), _at(now, keys))
    ]


def settings_of_latents(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the latents of two codecs depend on, of their sections in recipes, for comparison.

    `store: null` stands for whatever the autoencoder's class does by itself, so it fits any value.
    """
    kept = [
        {key: value for key, value in current_codec(dict(section)).items() if key not in NOT_OF_THE_LATENTS}
        for section in (one, other)
    ]
    if any(section.get("store") is None for section in kept):
        for section in kept:
            section.pop("store", None)
    return kept[0], kept[1]


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
    """Return the value at `keys`."""
    value: Any = recipe
    for key in keys:
        value = value.get(key)
    return value
