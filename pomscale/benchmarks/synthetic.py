"""Datasets for benchmarks, made by the real encoder from a table that repeats a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.encode.encode import encode
from pomscale.config.encode import EncodeRecipe

_NUM_PICTURES = 2048


def table_recipe(folder: Path, name: str, num_items: int, side: int, *, flip: bool, shard_samples: int) -> EncodeRecipe:
    """Return a recipe for grey pictures of side x side pixels with classes.

    The pixel codec makes latents (4, side/2, side/2) of them.
    """
    pictures = folder / f"pictures-{side}"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(_NUM_PICTURES):
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(
            pictures / f"{number}.png", compress_level=0
        )
    table = folder / f"{name}.jsonl"
    with table.open("w", encoding="utf-8") as stream:
        for number in range(num_items):
            stream.write(json.dumps({"file": f"{number % _NUM_PICTURES}.png", "label": number % 10}) + "\n")
    return EncodeRecipe.model_validate(
        {
            "kind": "encode",
            "name": name,
            "output": str(folder / name),
            "source": {
                "kind": "table",
                "path": str(table),
                "root": str(pictures),
                "media": "{file}",
                "label": "label",
            },
            "codec": {"name": "pixel", "channels": 1},
            "transform": {"size": side, "flip": flip},
            "shard_samples": shard_samples,
            "batch": 256,
            "num_workers": 2,
            "device": "cpu",
        }
    )


def make_dataset(folder: Path, name: str, num_items: int, side: int, *, flip: bool, shard_samples: int) -> Path:
    """Encode a set as `table_recipe` describes it, and return the dataset's folder."""
    recipe = table_recipe(folder, name, num_items, side, flip=flip, shard_samples=shard_samples)
    encode(recipe)
    return Path(recipe.output)
