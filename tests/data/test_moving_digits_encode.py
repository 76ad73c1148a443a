"""Moving digits to latents and back: grey clips through the video transform and the pixel codec, and their captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.encoding import read_all, shard_members
from support.paths import RECIPES

pytest.importorskip("sklearn")
pytest.importorskip("av")
pytest.importorskip("transformers")

from PIL import Image

from data_pipelines.check.verify import verify
from data_pipelines.demos.byte_t5 import write_byte_t5
from data_pipelines.demos.moving_digits import World, write_moving_digits
from data_pipelines.encode.encode import encode
from pomscale.codecs import build_codec
from pomscale.config.load import load_encode_recipe
from pomscale.shards.schema import read_manifest

RECIPE = RECIPES / "data" / "moving-digits.yaml"


def test_the_recipe_makes_latents_that_decode_to_the_digits(tmp_path: Path) -> None:
    world = World()
    write_moving_digits(tmp_path / "clips", world, {"train": 12, "heldout": 1})
    write_byte_t5(tmp_path / "t5")
    recipe = load_encode_recipe(
        RECIPE,
        [f"output={tmp_path}/latents", f"source.path={tmp_path}/clips/train", f"text.path={tmp_path}/t5"],
    )
    encode(recipe, progress=False)
    assert verify(tmp_path / "latents").problems == []
    manifest = read_manifest(tmp_path / "latents")
    assert manifest.text is not None
    assert manifest.text.dim == 64

    scans = {
        digit: [np.asarray(Image.open(file)) for file in sorted((tmp_path / f"clips/digits/train/{digit}").glob("*"))]
        for digit in world.digits
    }
    drawn: dict[str, list[np.ndarray]] = {caption: [] for caption in world.captions}
    for index in range(12):
        clip, caption = world.draw(index, 0, scans)
        drawn[caption].append(clip)
    latents, _ = read_all(tmp_path / "latents")
    captions = [member.decode() for member in shard_members(tmp_path / "latents", ".txt")]
    assert recipe.codec is not None
    decoded = build_codec(recipe.codec).decode(torch.from_numpy(latents)).numpy() * 255
    assert decoded.shape == (12, 1, 8, 8, 16)
    for clip, caption in zip(decoded[:, 0], captions, strict=True):
        # 17 grey levels, 16 apart: H.264 keeps them apart.
        nearest = min(drawn[caption], key=lambda known: np.abs(known - clip).mean())
        assert np.abs(nearest - clip).max() < 8
