from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from data_pipelines.inspect.show import show
from pomscale.base.errors import InputError, PomscaleError
from pomscale.codecs import build_codec
from pomscale.config.codecs import PixelCodecConfig, VaeCodecConfig
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import read_manifest
from support.damage import change_row
from support.synthetic_dataset import change_manifest, write_dataset
from support.tiny_models import save_video_vae

PIXELS = build_codec(PixelCodecConfig(name="pixel", block=2))


def test_pictures_become_a_grid_of_what_was_encoded(
    pictures: Path, make_recipe: Callable[..., EncodeRecipe], tmp_path: Path
) -> None:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    told = show(recipe.output, PIXELS, 100, tmp_path / "out" / "grid.png")
    assert told == f"{tmp_path}/out/grid.png: 21 samples, sorted by class (cat: 7, dog: 7, eel: 7)"
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (5 * 34 + 2, 5 * 34 + 2)
    assert show(recipe.output, PIXELS, 4, tmp_path / "grid.png", seed=1).startswith(f"{tmp_path}/grid.png: 4 samples")
    with pytest.raises(InputError, match="is not the one that made the latents"):
        show(recipe.output, build_codec(PixelCodecConfig(name="pixel", block=4)), 4, tmp_path / "grid.png")


def test_pictures_of_several_sizes_share_a_grid(
    pictures: Path, make_recipe: Callable[..., EncodeRecipe], tmp_path: Path
) -> None:
    recipe = make_recipe(pictures, transform={"buckets": [[32, 16], [16, 32]]})
    encode(recipe, progress=False)
    show(recipe.output, PIXELS, 100, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (5 * 34 + 2, 5 * 34 + 2)
    text = info(recipe.output)
    assert "21 pictures in 3 classes" in text
    assert "group 0     32x16 pixels -> (12, 16, 8): " in text
    assert "group 1     16x32 pixels -> (12, 8, 16): " in text


@pytest.mark.parametrize("moments", [False, True])
def test_clips_become_a_contact_sheet(tmp_path: Path, moments: bool) -> None:
    folder = tmp_path / "clips"
    vae = VaeCodecConfig(
        name="vae", path=str(save_video_vae(tmp_path / "vae", seed=0)), subfolder="", precision="fp32",
        store="moments" if moments else "sample",
    )  # fmt: skip
    codec = build_codec(vae)
    shape = codec.latent_shape(9, 16, 24)
    write_dataset(folder, [3], text=True, moments=moments, shapes=[shape])
    change_manifest(folder, "codec", "config", value=vae.model_dump())
    change_manifest(folder, "codec", "identity", value=codec.identity())
    change_manifest(folder, "transform", value={"kind": "video", "buckets": [[9, 16, 24]]})
    change_manifest(folder, "groups", 0, "target", value=[9, 16, 24])
    assert show(folder, codec, 2, tmp_path / "sheet.png") == f"{tmp_path}/sheet.png: 2 clips, 8 frames of each"
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] == 8 * (24 + 4) + 4
    # Below each row of frames there is a caption in black.
    captions = pixels[16 + 4 : pixels.shape[0] // 2]
    assert (captions < 64).all(axis=-1).any()
    text = info(folder)
    assert "3 clips in 5 classes, with captions" in text
    assert "fps 16.0" in text
    assert "9x16x24 pixels" in text


def test_text_alone_is_told_as_text(tmp_path: Path) -> None:
    write_dataset(tmp_path / "text", [5], text=True, latents=False)
    told = show(tmp_path / "text", None, 3, tmp_path / "none.png")
    assert len(told.splitlines()) == 3
    assert all("tokens  caption " in line for line in told.splitlines())
    assert not (tmp_path / "none.png").exists()
    text = info(tmp_path / "text")
    assert "5 captions" in text
    assert "(1 to 120, 5) float16; empty caption 1 long" in text
    assert read_manifest(tmp_path / "text").keys_sha256[:12] in text


@pytest.mark.parametrize(("field", "value"), [("shard", 7), ("shard", -1), ("latent_offset", -9), ("label", 3)])
def test_a_damaged_index_is_told(tmp_path: Path, field: str, value: int) -> None:
    write_dataset(tmp_path, [3])
    change_row(tmp_path, 1, field, value)
    with pytest.raises(PomscaleError, match=r"(index\.npy|shard-000000\.tar): .*pomscale data repair"):
        show(tmp_path, PIXELS, 3, tmp_path / "grid.png")


def test_the_same_samples_are_drawn_again(tmp_path: Path) -> None:
    write_dataset(tmp_path, [50], text=True, latents=False)
    first, again, other = (show(tmp_path, None, 5, tmp_path / "x", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
