"""Pictures and recipes that the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pomscale.config.encode import EncodeRecipe


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of real files: PNG, JPEG and WebP of several sizes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for label, (class_name, extension) in enumerate([("cat", "png"), ("dog", "jpg"), ("eel", "webp")]):
        folder = root / class_name
        folder.mkdir(parents=True)
        for i in range(7):
            height, width = 16 + 5 * i, 40 - 3 * i
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8) // (label + 1)
            Image.fromarray(pixels).save(folder / f"{i:02d}.{extension}")
    return root


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., EncodeRecipe]:
    def make(pictures: Path, **changes: object) -> EncodeRecipe:
        values = {
            "kind": "encode",
            "name": "test",
            "output": str(tmp_path / "latents"),
            "source": {"kind": "image_folder", "path": str(pictures)},
            "codec": {"name": "pixel", "block": 2, "channels": 3},
            "transform": {"size": 16, "flip": True},
            "shard_samples": 5,
            "batch": 3,
        }
        return EncodeRecipe.model_validate(values | changes)

    return make
