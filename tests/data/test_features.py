"""Sets of a teacher's features: what an encode writes, what it refuses, and what the verbs of `pomscale data` do."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from data_pipelines.check.repair import repair
from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.dry_run import describe
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from data_pipelines.inspect.show import show
from data_pipelines.inspect.stats import stats
from data_pipelines.inspect.stats_picture import draw_stats
from pomscale.base.errors import InputError
from pomscale.base.task_index import TaskIndex
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import MANIFEST_NAME, read_manifest
from support.encoding import contents, only, shard_members
from support.feature_sets import encode_features, encode_pixels, features_of, recipe_of, write_grey
from support.tiny_models import save_dinov2


def arrays(folder: Path, suffix: str) -> Tensor:
    """Return the arrays of a suffix of all records, in the order of the index."""
    return torch.from_numpy(np.stack([np.load(io.BytesIO(payload)) for payload in shard_members(folder, suffix)]))


class Means(nn.Module):
    """Means of 4x4 pixels; NaN for a picture that is black."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise RuntimeError("it takes colour")
        means = nn.functional.avg_pool2d(x.float(), 4)
        return torch.where(x.float().amax((1, 2, 3), keepdim=True) > 0, means, means / 0.0 * 0.0)


def save_means(file: Path) -> str:
    torch.jit.script(Means()).save(str(file))
    return f"torchscript:{file}"


def test_features_are_those_of_the_picture_and_of_the_mirrored_one(tmp_path: Path) -> None:
    source = write_grey(tmp_path / "in", 12)
    report = encode_features(source, tmp_path / "features")
    encode_pixels(source, tmp_path / "pixels")
    pixels = arrays(tmp_path / "pixels", ".latent.npy")
    found, of_mirrored = (arrays(tmp_path / "features", f".{name}.npy") for name in ("features", "feat_flip"))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, features_of(pixels), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(of_mirrored, features_of(pixels.flip(-1)), rtol=2e-3, atol=1e-3)
    mirrored = found.unflatten(1, (4, 4)).flip(2).flatten(1, 2)
    assert not torch.allclose(of_mirrored, mirrored, rtol=0.1, atol=0.1)  # no teacher is equivariant
    manifest, of_pixels = read_manifest(tmp_path / "features"), read_manifest(tmp_path / "pixels")
    assert manifest.keys_sha256 == of_pixels.keys_sha256
    assert manifest.transform == of_pixels.transform
    assert manifest.features is not None
    assert (manifest.features.grid, manifest.features.dim, manifest.features.has_flip) == ((4, 4), 64, True)
    assert verify(tmp_path / "features", progress=False).exit_code == report.exit_code == 0
    assert "features" not in of_pixels.model_dump()
    assert "features" not in of_pixels.recipe


def test_features_of_dinov2_are_encoded_from_colour(tmp_path: Path, pictures: Path) -> None:
    """The key of the teacher, `grid` and `sizes` in one: two datasets, each with its own transform."""
    pytest.importorskip("transformers")
    teacher = f"dinov2:{save_dinov2(tmp_path / 'dinov2', 0)}"
    features = {"teacher": teacher, "grid": [2, 3], "input_size": 56}
    transform = {"sizes": [8, 16], "filter": "adm"}
    report = encode_features(pictures, tmp_path / "out", features=features, transform=transform)
    assert [dataset.output.name for dataset in report.datasets] == ["8", "16"]
    for size in (8, 16):
        manifest = read_manifest(tmp_path / "out" / str(size))
        assert manifest.features is not None
        assert manifest.features.teacher == "dinov2"
        assert manifest.features.shape == (6, 16)
        assert manifest.transform is not None
        assert manifest.transform.targets == [(size, size)]
        assert manifest.arrays == ("features",)
    assert not torch.equal(*(arrays(tmp_path / "out" / size, ".features.npy") for size in ("8", "16")))


KILLED_BEFORE_COMMIT = """
import os, signal, sys
from data_pipelines.encode.encode import encode
from data_pipelines.shards.parts import PartStore
from pomscale.config.encode import EncodeRecipe
commits, commit = [], PartStore.commit
def commit_or_die(*arguments):
    commits.append(1)
    if len(commits) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(*arguments)
PartStore.commit = commit_or_die
encode(EncodeRecipe.model_validate_json(sys.argv[1]), progress=False)
"""


def test_killed_and_continued_by_two_tasks_the_bytes_are_the_same(tmp_path: Path) -> None:
    recipe = recipe_of(write_grey(tmp_path / "in", 22), tmp_path / "killed")
    command = [sys.executable, "-c", KILLED_BEFORE_COMMIT, recipe.model_dump_json()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / MANIFEST_NAME).exists()
    for index in range(2):
        report = encode(recipe, task=TaskIndex(index, 2), progress=False)
    assert report.num_resumed + report.num_made == 5
    encode(recipe.model_copy(update={"output": str(tmp_path / "whole")}), progress=False)
    killed, whole = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    killed.pop(MANIFEST_NAME), whole.pop(MANIFEST_NAME)  # which name the output
    assert killed == whole


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"teacher": "digits", "grid": [2, 2]}, r"holds parts of another encode: features is .*\[4, 4\].*\[2, 2\]"),
        ({"teacher": "dinov2", "grid": [4, 4]}, r"holds parts of another encode: features is .*digits.*dinov2.*here"),
    ],
)
def test_another_teacher_or_grid_does_not_continue_an_encode(
    tmp_path: Path, features: dict[str, object], message: str
) -> None:
    source = write_grey(tmp_path / "in", 8)
    encode_features(source, tmp_path / "out", transform={"size": 8})
    changes: dict[str, object] = {"features": features}
    if features["teacher"] == "dinov2":
        pytest.importorskip("transformers")
        changes["features"] = features | {"teacher": f"dinov2:{save_dinov2(tmp_path / 'dinov2', 0)}"}
    with pytest.raises(InputError, match=message):
        encode_features(source, tmp_path / "out", transform={"size": 8}, **changes)


def test_another_state_of_a_teacher_does_not_continue_an_encode(tmp_path: Path, pictures: Path) -> None:
    pytest.importorskip("transformers")
    for seed, place in enumerate(("a", "b")):
        save_dinov2(tmp_path / place, seed)
    settings = {"transform": {"size": 8}}
    first = {"teacher": f"dinov2:{tmp_path / 'a'}", "input_size": 28}
    encode_features(pictures, tmp_path / "out", features=first, **settings)
    for changes in ({"teacher": f"dinov2:{tmp_path / 'b'}"}, {"input_size": 42, "grid": [2, 2]}):
        with pytest.raises(InputError, match="another encode: features_identity is"):
            encode_features(pictures, tmp_path / "out", features=first | changes, **settings)
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = first | {"teacher": f"dinov2:{tmp_path / 'moved'}"}
    assert encode_features(pictures, tmp_path / "out", features=moved, **settings).num_resumed == 5


def test_features_that_are_not_finite_are_failures(tmp_path: Path, pictures: Path) -> None:
    Image.new("RGB", (16, 16)).save(pictures / "cat" / "black.png")
    settings = {"transform": {"size": 8}, "features": {"teacher": save_means(tmp_path / "means.pt")}}
    report = encode_features(pictures, tmp_path / "out", **settings)
    assert (only(report).num_samples, only(report).num_failures, report.exit_code) == (21, 1, 3)
    failures = (tmp_path / "out" / "failures.jsonl").read_text()
    assert "black" in failures
    assert "its features have 12 of 12 values that are NaN" in failures
    assert encode_features(pictures, tmp_path / "out", max_skipped=1, **settings).exit_code == 0
    assert verify(tmp_path / "out", progress=False).exit_code == 0


def test_the_size_is_told_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the byte, and by an encode before its first part."""
    recipe = recipe_of(write_grey(tmp_path / "in", 10), tmp_path / "out")
    told = describe(recipe)
    encode(recipe)
    line = capsys.readouterr().out
    (shard, other) = (tmp_path / "out" / f"shard-{number:06d}.tar" for number in range(2))
    with shard.open("rb") as stream:
        content = stream.read().rstrip(b"\0")
    per_sample = -(-len(content) // 512) * 512 // 5
    assert other.stat().st_size == shard.stat().st_size
    assert f"4x4 tokens of 64, float16, also of the mirrored pictures: {per_sample:,} bytes per sample" in line
    assert f"{per_sample * 10 / 1e9:,.3f} GB for 10 samples" in line
    assert "features, features_flip ((4, 4) tokens of 64)" in told
    assert "bytes per sample" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {"name": "uint8"}}, "leave out `codec`"),
        ({"text": {"path": "x"}}, "leave out `text`"),
        ({"transform": None}, "give the transform of the pictures"),
        ({"transform": {"buckets": [[8, 8], [8, 16]]}}, "all records of a set have one grid"),
        ({"features": {"teacher": "digits", "grid": [1, 4, 4]}}, r"features\.grid: give \[rows, columns\]"),
        ({"source": {"kind": "latents", "path": "x"}}, "a source of kind latents without files has captions only"),
        ({"transform": {"kind": "video", "buckets": [[8, 8, 8]]}}, r"features\.grid: clips need one"),
        (
            {"transform": {"kind": "video", "buckets": [[8, 8, 8]]}, "features": {"teacher": "digits", "grid": [4, 4]}},
            r"features\.grid: give \[frame groups",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    values = recipe_of(tmp_path, tmp_path / "out").model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        EncodeRecipe.model_validate(values | changes)


def test_a_picture_size_that_the_teacher_does_not_take_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it takes pictures of 8x8"):
        encode_features(write_grey(tmp_path / "in", 2), tmp_path / "out", transform={"size": 16})
    assert not (tmp_path / "out").exists()


def test_clips_have_features_of_one_frame_per_group(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from support.make_video import numbered_frame, write_video  # noqa: PLC0415  after importorskip

    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "x.mp4", [numbered_frame(number, 16, 24) for number in range(8)], 16)
    transform = {"kind": "video", "fps": 16, "buckets": [[8, 16, 24]], "flip": True}
    source = {"kind": "video_folder", "path": str(tmp_path / "in")}
    features = {"teacher": save_means(tmp_path / "means.pt"), "grid": [2, 2, 3]}
    encode_features(tmp_path / "in", tmp_path / "out", source=source, transform=transform, features=features)
    latents = {"codec": {"name": "pixel", "block": 1}, "source": source, "transform": transform}
    encode(recipe_of(tmp_path / "in", tmp_path / "latents", **latents), progress=False)
    clip = arrays(tmp_path / "latents", ".latent.npy").float().add(1).mul(127.5)[0]  # (3, 8, 16, 24)
    frames = clip[:, [2, 6]].unflatten(2, (2, 8)).unflatten(4, (3, 8)).mean((3, 5))  # (3, 2, 2, 3)
    found = arrays(tmp_path / "out", ".features.npy")[0].float()
    torch.testing.assert_close(found, frames.flatten(1).T, rtol=2e-3, atol=0.2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.features is not None
    assert manifest.features.grid == (2, 2, 3)
    assert "2x2x3 tokens of 3" in info(tmp_path / "out")
    assert verify(tmp_path / "out", progress=False).exit_code == 0


def test_damage_is_found_and_repaired(tmp_path: Path) -> None:
    encode_features(write_grey(tmp_path / "in", 12), tmp_path / "out")
    shard = tmp_path / "out" / "shard-000001.tar"
    whole = shard.read_bytes()
    position = whole.index(b".feat_flip.npy") + 2000
    shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    report = verify(tmp_path / "out", progress=False)
    assert report.bad_shards == [shard.name]
    assert "features_flip_crc32" in "\n".join(report.problems)
    assert repair(tmp_path / "out", progress=False).exit_code == 0
    assert shard.read_bytes() == whole


def test_split_as_its_pictures_and_merged_again(tmp_path: Path) -> None:
    """One seed deals the features as it deals the pictures, so halves need no join."""
    source = write_grey(tmp_path / "in", 20)
    for name, write in (("features", encode_features), ("pixels", encode_pixels)):
        write(source, tmp_path / name)
        split(tmp_path / name, {tmp_path / f"{name}-a": 0.6, tmp_path / f"{name}-b": 0.4}, progress=False)
    for half in "ab":
        manifests = [read_manifest(tmp_path / f"{name}-{half}") for name in ("features", "pixels")]
        assert manifests[0].keys_sha256 == manifests[1].keys_sha256
        assert verify(tmp_path / f"features-{half}", progress=False).exit_code == 0
    merge([tmp_path / "features-a", tmp_path / "features-b"], tmp_path / "merged", progress=False)
    before, after = (arrays(tmp_path / name, ".features.npy") for name in ("features", "merged"))
    assert sorted(map(bytes, before.numpy())) == sorted(map(bytes, after.numpy()))
    assert read_manifest(tmp_path / "merged").features == read_manifest(tmp_path / "features").features
    encode_features(
        write_grey(tmp_path / "more", 4, seed=1), tmp_path / "other", features={"teacher": "digits", "grid": [2, 2]}
    )
    with pytest.raises(InputError, match="merge: features of"):
        merge([tmp_path / "features", tmp_path / "other"], tmp_path / "never", progress=False)


def test_info_stats_and_show_know_features(tmp_path: Path) -> None:
    encode_features(write_grey(tmp_path / "in", 6), tmp_path / "out")
    text = info(tmp_path / "out")
    assert "8x8 pixels -> 4x4 tokens of 64, float16, also of the mirrored pictures" in text
    assert "digits, identity" in text
    report = stats(tmp_path / "out", progress=False)
    both = torch.cat([arrays(tmp_path / "out", f".{name}.npy") for name in ("features", "feat_flip")]).double()
    assert f"mean {both.mean():.4f}, std {both.std(correction=0):.4f}" in str(report)
    assert report.exit_code == 0
    draw_stats(report, tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    lines = show(tmp_path / "out", None, 4, tmp_path / "never.png").splitlines()
    assert len(lines) == 4
    assert "16 tokens, norm" in lines[0]
    assert not (tmp_path / "never.png").exists()
