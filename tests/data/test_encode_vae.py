"""Encodes through codec vae: constants of channels, what is refused before work, and encodes of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.check.verify import verify
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from pomscale.base.errors import InputError
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import Normalization, read_manifest
from support.encoding import contents, only
from support.make_video import numbered_frame, write_video
from support.tiny_models import save_vae
from support.tiny_vaes import TINY_VAES, save_tiny_vae

MakeRecipe = Callable[..., EncodeRecipe]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        frames: list[np.ndarray] = [numbered_frame(number + i, 36, 64) for number in range(30)]
        write_video(folder / f"{i}.mp4", frames, 24)
    return folder


def clip_recipe(make_recipe: MakeRecipe, clips: Path, codec: dict[str, object], **changes: object) -> EncodeRecipe:
    values: dict[str, object] = {
        "source": {"kind": "video_folder", "path": str(clips)},
        "codec": codec,
        "transform": {"kind": "video", "fps": 8, "buckets": [[9, 32, 48]]},
        "batch": 2,
    }
    return make_recipe(clips, **(values | changes))


def test_constants_of_each_channel_are_in_the_manifest(clips: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    codec = {"name": "vae", "path": str(save_tiny_vae(tmp_path / "wan", "wan21"))}
    recipe = clip_recipe(make_recipe, clips, codec)
    assert only(encode(recipe, progress=False)).num_samples == 3
    assert verify(recipe.output).problems == []
    manifest = read_manifest(recipe.output)
    assert manifest.groups[0].shape == (4, 3, 4, 6)
    assert manifest.latent_codec.config.model_dump()["store"] == "sample"
    assert not manifest.latents.stores_moments
    arguments = TINY_VAES["wan21"][1]
    normalization = Normalization.of(manifest, "codec")
    assert normalization.mean == tuple(arguments["latents_mean"])
    np.testing.assert_allclose(normalization.std, arguments["latents_std"], rtol=1e-12)
    assert "(latent - [-0.7 0.1 1.5 -0.3]) * [0.3571 0.7143 1.667 0.9091]" in info(recipe.output)


@pytest.mark.parametrize(
    ("vae", "bucket", "problem"),
    [
        ("sd", [9, 32, 48], r"the AutoencoderKL in .* takes pictures, and no clips; set transform\.kind: image"),
        ("wan21", [8, 32, 48], r"4k \+ 1 frames and multiples of 8 pixels, the nearest are 5 or 9 x 32 x 48"),
        ("ltx", [9, 32, 48], r"8k \+ 1 frames and multiples of 32 pixels, the nearest are 9 x 32 x 32 or 64"),
    ],
)
def test_what_the_autoencoder_does_not_take_is_refused_before_anything_is_written(
    clips: Path, make_recipe: MakeRecipe, tmp_path: Path, vae: str, bucket: list[int], problem: str
) -> None:
    codec = {"name": "vae", "path": str(save_tiny_vae(tmp_path / "vae", vae))}
    recipe = clip_recipe(make_recipe, clips, codec, transform={"kind": "video", "fps": 8, "buckets": [bucket]})
    with pytest.raises(InputError, match=problem):
        encode(recipe, progress=False)
    assert not Path(recipe.output).exists()


def test_an_encode_that_an_earlier_version_began_goes_on(
    pictures: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    codec = {"name": "sd_vae", "path": str(save_vae(tmp_path / "vae", seed=0))}
    recipe = make_recipe(pictures, codec=codec, shard_samples=4)
    encode(recipe, progress=False)
    whole = contents(Path(recipe.output))
    parts = Path(recipe.output) / "parts"
    plan = json.loads((parts / "plan.json").read_text())
    plan["codec"] = {"name": "sd_vae", "store": "moments", "precision": "fp32"}
    (parts / "plan.json").write_text(json.dumps(plan))
    (parts / "part-000001.json").unlink()
    report = encode(recipe, progress=False)
    assert (report.num_made, report.num_resumed) == (1, report.num_parts - 1)
    again = contents(Path(recipe.output))
    assert {name for name in whole if whole[name] != again.get(name)} <= {"parts/plan.json"}
    plan["codec"]["store"] = "sample"
    (parts / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"codec"):
        encode(recipe, progress=False)
