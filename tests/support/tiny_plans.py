"""Recipes of trainings that are small enough for a plan to be held against real steps, on eight ranks."""

from __future__ import annotations

from typing import Any

from pomscale.benchmarks.plan import make_recipe
from pomscale.config.train import TrainRecipe

TINY = {"size": "s-2", "depth": 4, "latent_shape": [4, 16, 16], "batch": 6}
TINY_MODEL = {"dim": 64, "num_heads": 4}
TINY_CLIPS = {"size": "s-2", "depth": 4, "latent_shape": [16, 8, 8, 12], "batch": 3}
TINY_VIDEO_MODEL = {**TINY_MODEL, "text_dim": 96}


def tiny(mixer: str = "dipom", num_ranks: int = 8, **changes: dict[str, Any]) -> TrainRecipe:
    return make_recipe(mixer, TINY, {"model": TINY_MODEL, **changes}, num_ranks)


def tiny_video(mixer: str = "vdipom", **changes: dict[str, Any]) -> TrainRecipe:
    return make_recipe(mixer, TINY_CLIPS, {**changes, "model": {**TINY_VIDEO_MODEL, **changes.get("model", {})}}, 8)
