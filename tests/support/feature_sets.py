"""Small sets of grey pictures, and of the features of the demo's network beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.encode.encode import EncodeReport, encode
from pomscale.codecs.extractors.digits import Digits
from pomscale.config.encode import EncodeRecipe


def write_grey(folder: Path, count: int, seed: int = 0) -> Path:
    """Write pictures of 8x8 in two classes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{seed}-{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def recipe_of(pictures: Path, output: Path, **changes: object) -> EncodeRecipe:
    """Return the recipe of features of the digits' network; with codec: uint8, that of the pictures."""
    values: dict[str, object] = {
        "kind": "encode",
        "name": output.name,
        "output": str(output),
        "source": {"kind": "image_folder", "path": str(pictures)},
        "transform": {"size": 8, "flip": True},
        "features": {"teacher": "digits"},
        "shard_samples": 5,
        "batch": 3,
    }
    if "codec" in changes:
        del values["features"]
    return EncodeRecipe.model_validate(values | changes)


def encode_features(pictures: Path, output: Path, **changes: object) -> EncodeReport:
    return encode(recipe_of(pictures, output, **changes), progress=False)


def encode_pixels(pictures: Path, output: Path, **changes: object) -> EncodeReport:
    codec = {"name": "uint8", "channels": 1}
    return encode(recipe_of(pictures, output, codec=codec, **changes), progress=False)


def features_of(pictures: Tensor) -> Tensor:
    """Return the features (b, 16, 64) float16 of pictures (b, 1, 8, 8) uint8, by the network itself."""
    with torch.no_grad():
        maps = Digits()._network.map(pictures.float() / 255.0)
    return maps.flatten(2).transpose(1, 2).half()
