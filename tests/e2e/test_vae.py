"""The whole way with a real diffusers AutoencoderKL (small, random weights): moments, flips, training, decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.paths import RECIPES
from support.running import losses, pomscale, train, write_tiny_recipe
from support.tiny_models import save_vae


def test_from_colour_pictures_to_decoded_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / str(label) / f"{i}.webp")
    vae = save_vae(tmp_path / "vae", seed=0)
    pomscale(
        "data", "encode", RECIPES / "data" / "imagenet-256.yaml", f"source.path={tmp_path}/pictures",
        f"output={tmp_path}/latents/train", f"codec.path={vae}", "codec.precision=bf16",
        "transform.size=16", "transform.flip=true",
    )  # fmt: skip
    pomscale("data", "verify", tmp_path / "latents" / "train")

    recipe = write_tiny_recipe(tmp_path, tmp_path)
    model = ["codec={name: vae, path: " + str(vae) + "}", "model.latent_shape=[4, 8, 8]", "model.patch_size=2"]
    short = ["training.total_samples=160", "schedule={}", "data.flip_probability=0.5", "data.normalization=codec"]
    train(recipe, *model, *short)
    assert all(np.isfinite(list(losses(tmp_path / "runs" / "tiny").values())))
    run_folder = tmp_path / "runs" / "tiny"
    pomscale("sample", run_folder, "--classes", "0-1", "--num", "2", "--steps", "3", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"

    # The weights have moved: named on the command line they are found.
    moved = vae.rename(tmp_path / "moved")
    done = pomscale("sample", run_folder, "--num", "1", "--out", tmp_path / "lost.png", expect=2)
    assert "codec.path" in done.stderr
    pomscale("sample", run_folder, "--num", "1", "--codec-path", moved, "--out", tmp_path / "found.png")

    # Other weights at the same place would decode to wrong colours: refused.
    save_vae(vae, seed=1)
    done = pomscale("sample", run_folder, "--num", "1", "--out", tmp_path / "wrong.png", expect=2)
    assert "its weights are not those that made the training latents" in done.stderr
    assert not (tmp_path / "wrong.png").exists()


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_missing_weights_are_one_clear_error(path: str, digits: Path, tmp_path: Path) -> None:
    source = f"source.path={digits}/digits/train"
    done = pomscale(
        "data", "encode", RECIPES / "data" / "imagenet-256.yaml", source, f"output={tmp_path}/out",
        f"codec.path={tmp_path / path}", expect=2,
    )  # fmt: skip
    assert "codec.path" in done.stderr
    assert "Traceback" not in done.stderr
