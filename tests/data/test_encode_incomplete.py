"""Clips that end early: failures, or kept, marked and counted; and encodes that an older version began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.encode import encode
from data_pipelines.inspect.info import info
from pomscale.base.errors import InputError
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, read_manifest
from support.encoding import only, shard_members
from support.make_video import numbered_frame, write_video

MakeRecipe = Callable[..., EncodeRecipe]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three whole clips of 2 s, and one that is cut off in the middle."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        frames = [numbered_frame(n, 24, 32) // 2 + rng.integers(0, 100, (24, 32, 3), np.uint8) for n in range(16)]
        write_video(folder / f"{name}.mkv", frames, 8, codec_options={"preset": "ultrafast"})
    whole = (folder / "d.mkv").read_bytes()
    (folder / "d.mkv").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def recipe_of(make_recipe: MakeRecipe, clips: Path) -> Callable[..., EncodeRecipe]:
    def make(changes: dict[str, Any] | None = None, **others: Any) -> EncodeRecipe:
        transform = {"kind": "video", "fps": 8, "buckets": [[16, 24, 32], [4, 24, 32]]} | (changes or {})
        source = {"kind": "video_folder", "path": str(clips)}
        return make_recipe(clips, source=source, transform=transform, **others)

    return make


def test_a_clip_that_ends_early_is_a_failure(recipe_of: Callable[..., EncodeRecipe]) -> None:
    recipe = recipe_of()
    report = encode(recipe, progress=False)
    assert (only(report).num_samples, only(report).num_failures, report.exit_code) == (3, 1, 3)
    line = json.loads((Path(recipe.output) / FAILURES_NAME).read_text())
    assert line["path"] == "d.mkv"
    assert "s of 2.00 s, then the end of the file (Matroska / WebM); replace the file, or keep" in line["reason"]


def test_or_it_is_kept_marked_and_counted(recipe_of: Callable[..., EncodeRecipe], tmp_path: Path) -> None:
    recipe = recipe_of({"incomplete": "keep"})
    report = encode(recipe, progress=False)
    assert (only(report).num_samples, only(report).num_incomplete, report.exit_code) == (4, 1, 0)
    kept = "1 clips that end early were kept"
    assert kept in str(report)
    folder = Path(recipe.output)
    marks = {entry["source"]: entry["incomplete"] for entry in map(json.loads, shard_members(folder, ".json"))}
    assert " s of 2.00 s, then the end of the file" in marks.pop("d.mkv")
    assert marks == dict.fromkeys(["a.mkv", "b.mkv", "c.mkv"])
    verified = verify(folder, progress=False)
    assert (verified.problems, verified.num_incomplete) == ([], 1)
    assert kept in str(verified)
    assert "1 clips end early" in info(folder)
    # A second run reads it from the manifest; derived sets count it, too.
    assert kept in str(encode(recipe, progress=False))
    split(folder, {tmp_path / "one": 0.5, tmp_path / "two": 0.5}, seed=2, progress=False)
    assert sorted(read_manifest(tmp_path / name).num_incomplete for name in ("one", "two")) == [0, 1]
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    assert read_manifest(tmp_path / "both").num_incomplete == 1


@pytest.mark.parametrize(("filter", "is_refused"), [("area", True), ("lanczos", False)])
def test_a_half_done_encode_of_before_is_refused(
    make_recipe: MakeRecipe, pictures: Path, filter: str, is_refused: bool
) -> None:
    """Where it would get other pixels; `lanczos` of pictures has not changed."""
    recipe = make_recipe(pictures, transform={"size": 8, "filter": filter})
    encode(recipe, progress=False)
    _as_of_before(Path(recipe.output))
    if not is_refused:
        assert encode(recipe, progress=False).num_made == 0
        return
    with pytest.raises(InputError, match=r"transform_version is 1 there and 2 here; choose another output, or delete"):
        encode(recipe, progress=False)


def test_half_done_clips_of_before_are_refused(recipe_of: Callable[..., EncodeRecipe]) -> None:
    recipe = recipe_of(max_skipped=1)
    encode(recipe, progress=False)
    _as_of_before(Path(recipe.output))
    with pytest.raises(InputError, match=r"transform_version is 1 there and 2 here.*the version of pomscale that"):
        encode(recipe, progress=False)


def test_sets_of_two_versions_are_not_merged(make_recipe: MakeRecipe, pictures: Path, tmp_path: Path) -> None:
    recipes = [make_recipe(pictures, output=str(tmp_path / name)) for name in ("cat", "dog")]
    for recipe in recipes:
        encode(recipe, progress=False)
    path = tmp_path / "dog" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transform_version": 9}))
    with pytest.raises(InputError, match=r"transform_version of .*cat is 1, but that of .*dog is 9"):
        merge([tmp_path / "cat", tmp_path / "dog"], tmp_path / "both", progress=False)


def _as_of_before(output: Path) -> None:
    """Make a specification what older versions have written."""
    path = output / "parts" / "plan.json"
    spec = json.loads(path.read_text())
    spec.pop("transform_version", None)  # which is written only where it is not 1
    path.write_text(json.dumps(spec))
