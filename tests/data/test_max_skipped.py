"""`max_skipped`: how many items may be skipped before encode, verify and repair say so by their exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.check.repair import repair
from data_pipelines.check.verify import verify
from data_pipelines.derive.merge import merge
from data_pipelines.derive.split import split
from data_pipelines.encode.encode import encode
from pomscale.config.encode import EncodeRecipe
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, read_manifest

MakeRecipe = Callable[..., EncodeRecipe]
NUM_BAD = 2


@pytest.fixture
def bad_pictures(pictures: Path) -> Path:
    (pictures / "cat" / "bad.png").write_bytes(b"this is no picture")
    (pictures / "eel" / "empty.webp").write_bytes(b"")
    return pictures


def exit_codes(recipe: EncodeRecipe) -> tuple[int, int, int]:
    """Of an encode, of a verify after it, and of a repair that has a shard to make."""
    encoded = encode(recipe, progress=False).exit_code
    output = Path(recipe.output)
    verified = verify(output, progress=False).exit_code
    (output / read_manifest(output).shards[0].name).unlink()
    return encoded, verified, repair(output, progress=False).exit_code


@pytest.mark.parametrize(("max_skipped", "expected"), [(0, 3), (NUM_BAD - 1, 3), (NUM_BAD, 0), (100, 0)])
def test_all_three_go_by_the_recipe(
    bad_pictures: Path, make_recipe: MakeRecipe, max_skipped: int, expected: int
) -> None:
    recipe = make_recipe(bad_pictures, max_skipped=max_skipped)
    assert exit_codes(recipe) == (expected, expected, expected)
    failures = (Path(recipe.output) / FAILURES_NAME).read_text(encoding="utf-8").splitlines()
    assert len(failures) == NUM_BAD, "they are listed in any case"
    told = str(verify(recipe.output, progress=False))
    assert "whole; 2 items were skipped, listed in" in told


def test_another_number_counts_for_a_finished_set_too(bad_pictures: Path, make_recipe: MakeRecipe) -> None:
    """Nothing is encoded again, but verify must not go on by the old number."""
    recipe = make_recipe(bad_pictures)
    assert encode(recipe, progress=False).exit_code == 3
    output = Path(recipe.output)
    before = read_manifest(output)
    report = encode(recipe.model_copy(update={"max_skipped": NUM_BAD}), progress=False)
    assert (report.num_made, report.exit_code, verify(output, progress=False).exit_code) == (0, 0, 0)
    assert read_manifest(output).fingerprint == before.fingerprint
    assert encode(recipe, progress=False).exit_code == 3
    assert verify(output, progress=False).exit_code == 3


def test_a_set_of_an_older_release_puts_up_with_none(bad_pictures: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(bad_pictures, max_skipped=NUM_BAD)
    encode(recipe, progress=False)
    path = Path(recipe.output) / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["recipe"]["max_skipped"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert verify(recipe.output, progress=False).exit_code == 3


def test_each_size_of_a_pass_is_judged_alone(bad_pictures: Path, make_recipe: MakeRecipe) -> None:
    """A picture that fails is missing from both sets: that is one item, not two."""
    recipe = make_recipe(bad_pictures, transform={"sizes": [8, 16]}, max_skipped=NUM_BAD)
    assert encode(recipe, progress=False).exit_code == 0
    for size in ("8", "16"):
        assert verify(Path(recipe.output) / size, progress=False).exit_code == 0


def test_a_task_is_judged_by_its_own_items_until_the_set_is_there(bad_pictures: Path, make_recipe: MakeRecipe) -> None:
    """Another process holds part 0: the task leaves it, and cannot know what will fail in it."""
    recipe = make_recipe(bad_pictures, max_skipped=NUM_BAD - 1, shard_samples=1)
    holder = (
        "import sys; from pathlib import Path; from pomscale.base.claims import Claims\n"
        f"with Claims(Path({str(Path(recipe.output) / 'parts')!r}), several=True) as claims:\n"
        "    assert claims.claim(0); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        report = encode(recipe, progress=False)
        process.kill()
    assert report.datasets == ()
    assert (report.num_failed, report.exit_code) == (NUM_BAD, 3)
    assert encode(recipe.model_copy(update={"max_skipped": NUM_BAD}), progress=False).exit_code == 0


def test_sets_made_of_others_are_not_judged_again(bad_pictures: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(bad_pictures, max_skipped=NUM_BAD)
    encode(recipe, progress=False)
    halves = {tmp_path / "a": 0.5, tmp_path / "b": 0.5}
    split(recipe.output, halves, progress=False)
    merge(list(halves), tmp_path / "merged", progress=False)
    for folder in (*halves, tmp_path / "merged"):
        assert verify(folder, progress=False).exit_code == 0
    assert read_manifest(tmp_path / "merged").num_failures == NUM_BAD
