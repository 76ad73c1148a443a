from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.check.repair import repair
from data_pipelines.check.verify import verify
from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import INDEX_NAME, MANIFEST_NAME, read_manifest
from pomscale.sources.protocol import LISTING_VERSION


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What makes the dataset, with the time at which it was written."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.suffix == ".tar" or path.name in (INDEX_NAME, MANIFEST_NAME)
    }


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def encoded(pictures: Path, make_recipe: Callable[..., EncodeRecipe]) -> Path:
    recipe = make_recipe(pictures)
    encode(recipe, progress=False)
    return Path(recipe.output)


def test_bad_shards_are_made_again_and_nothing_else(encoded: Path) -> None:
    before = files_of(encoded)
    assert len(before) == 5 + 2
    names = sorted(name for name in before if name.endswith(".tar"))
    flip_bit(encoded / names[1], 700)
    (encoded / names[3]).unlink()
    report = repair(encoded, progress=False)
    assert report.exit_code == 0
    assert f"made again: {names[1]}, {names[3]}" in str(report)
    assert verify(encoded, progress=False).problems == []
    after = files_of(encoded)
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    untouched = [name for name in names if name not in (names[1], names[3])]
    assert all(after[name] == before[name] for name in untouched)
    assert repair(encoded, progress=False).encoded is None


def test_an_index_is_made_again(encoded: Path) -> None:
    before = (encoded / INDEX_NAME).read_bytes()
    flip_bit(encoded / INDEX_NAME, 500)
    assert repair(encoded, progress=False).exit_code == 0
    assert (encoded / INDEX_NAME).read_bytes() == before


def test_shards_of_several_groups_are_made_again(pictures: Path, make_recipe: Callable[..., EncodeRecipe]) -> None:
    recipe = make_recipe(pictures, transform={"buckets": [[16, 8], [8, 16]]}, shard_samples=11)
    encode(recipe, progress=False)
    output = Path(recipe.output)
    before = files_of(output)
    names = [shard.name for shard in read_manifest(output).shards]
    assert len(names) > 2
    flip_bit(output / names[-1], 700)
    assert repair(output, progress=False).exit_code == 0
    assert {n: content for n, (content, _) in files_of(output).items()} == {n: c for n, (c, _) in before.items()}


def test_one_size_of_several_is_made_again(pictures: Path, make_recipe: Callable[..., EncodeRecipe]) -> None:
    recipe = make_recipe(pictures, transform={"sizes": [8, 16]})
    encode(recipe, progress=False)
    output = Path(recipe.output) / "8"
    before = files_of(output)
    assert verify(output, progress=False).problems == []
    flip_bit(output / "shard-000001.tar", 700)
    assert repair(output, progress=False).exit_code == 0
    for name, (content, _) in files_of(output).items():
        assert content == before[name][0], name


def test_a_source_that_moved_is_named_by_an_override(encoded: Path, pictures: Path, tmp_path: Path) -> None:
    before = files_of(encoded)
    flip_bit(encoded / "shard-000000.tar", 700)
    shutil.move(pictures, tmp_path / "moved")
    with pytest.raises(InputError, match=r"if they have moved, say where they are: source.path="):
        repair(encoded, progress=False)
    assert (encoded / MANIFEST_NAME).exists()
    with pytest.raises(InputError, match="num_workers"):
        repair(encoded, ["num_workers=0"], progress=False)
    assert repair(encoded, [f"source.path={tmp_path / 'moved'}"], progress=False).exit_code == 0
    assert verify(encoded, progress=False).problems == []
    for name, (content, _) in files_of(encoded).items():
        assert content == before[name][0] or name == MANIFEST_NAME


def test_a_repair_that_was_broken_off_goes_on(encoded: Path) -> None:
    """The manifest, which has the recipe, is gone by then."""
    before = files_of(encoded)
    shard = encoded / "shard-000002.tar"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(PomscaleError, match=r"cannot write .*shard-000002.tar"):
        repair(encoded, progress=False)
    assert not (encoded / MANIFEST_NAME).exists()
    shard.rmdir()
    with pytest.raises(InputError, match="a repair mends"):
        repair(encoded, ["output=elsewhere"], progress=False)
    report = repair(encoded, progress=False)
    assert report.exit_code == 0
    assert "after the repair" in str(report)
    assert {n: content for n, (content, _) in files_of(encoded).items()} == {n: c for n, (c, _) in before.items()}


def test_a_dataset_of_another_version_is_refused_and_keeps_what_it_has(encoded: Path) -> None:
    """Parts of two versions would lie in one set; and a refusal must not cost the manifest."""
    plan = encoded / "parts" / "plan.json"
    spec = json.loads(plan.read_text())
    plan.write_text(json.dumps(spec | {"transform_version": 9}))
    (encoded / "shard-000000.tar").unlink()
    before = files_of(encoded)
    told = (
        r"transform_version is 9 there and 1 here; .*delete that folder, or use the version of pomscale that began it"
    )
    with pytest.raises(InputError, match=told):
        repair(encoded, progress=False)
    assert files_of(encoded) == before


def test_foreign_tars_are_told_and_left(encoded: Path) -> None:
    shutil.copy(encoded / "shard-000000.tar", encoded / "other.tar")
    report = repair(encoded, progress=False)
    assert report.exit_code == 1
    assert "other.tar: is not in the manifest" in str(report)
    assert (encoded / "other.tar").exists()


def test_another_output_is_refused(encoded: Path) -> None:
    with pytest.raises(InputError, match="a repair mends"):
        repair(encoded, ["output=elsewhere"], progress=False)


def test_a_source_that_was_listed_by_other_rules_is_listed_again_before_a_repair(encoded: Path, pictures: Path) -> None:
    """Locations may have another meaning now: a part that is made again would lack items, or have others."""
    totals = encoded / "parts" / "items.json"
    listed = json.loads(totals.read_text())
    del listed["listing_version"]
    totals.write_text(json.dumps(listed))
    (pictures / "cat" / "more.png").write_bytes((pictures / "cat" / "00.png").read_bytes())
    (encoded / "shard-000000.tar").unlink()
    before = files_of(encoded)
    with pytest.raises(InputError, match=r"lists it in another way .*; choose another output, or use the version"):
        repair(encoded, progress=False)
    assert files_of(encoded) == before
    (pictures / "cat" / "more.png").unlink()
    assert repair(encoded, progress=False).exit_code == 0
    assert json.loads(totals.read_text())["listing_version"] == LISTING_VERSION
