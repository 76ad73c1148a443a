"""A run on a damaged dataset: it leaves out the bad samples, counts them, and stops when there are too many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pomscale.checkpoint.store import find_checkpoint
from support.damage import flip_bit
from support.running import (
    GLOBAL_BATCH,
    NUM_STEPS,
    checkpoint_samples,
    losses,
    run,
    train,
    train_command,
    write_tiny_recipe,
)

BAD = (3, 100, 500)


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    """The tiny run on a damaged copy of its dataset of 901 samples."""
    shutil.copytree(digits / "latents" / "train", tmp_path / "latents" / "train")
    for record in BAD:
        flip_bit(tmp_path / "latents" / "train", record)
    return write_tiny_recipe(tmp_path, tmp_path)


def rows(recipe: Path) -> list[dict[str, float]]:
    lines = (recipe.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "data/bad_samples" in row]


def bad_records(recipe: Path) -> list[int]:
    lines = (recipe.parent / "runs" / "tiny" / "bad_samples.jsonl").read_text().splitlines()
    return [json.loads(line)["record"] for line in lines]


def test_bad_samples_are_left_out_counted_and_listed(recipe: Path) -> None:
    total = 50 * GLOBAL_BATCH
    longer = f"training.total_samples={total}"
    train(recipe, "data.bad_samples=skip", "data.max_bad_samples=3", longer, num_processes=2)
    last = rows(recipe)[-1]
    assert last["samples"] == total
    assert last["data/bad_samples"] == len(BAD)  # though the second epoch met some of them again
    assert last["data/epoch"] == pytest.approx(total / 901)
    assert sorted(bad_records(recipe)) == sorted(BAD)


@pytest.mark.slow
def test_the_limit_holds_over_a_resume_and_on_all_ranks(recipe: Path) -> None:
    limit = ["data.bad_samples=skip", "data.max_bad_samples=2", "checkpoint.every_samples=32"]
    first = run(train_command(recipe, *limit, num_processes=2), expect=1)
    assert "3 samples could not be read, more than data.max_bad_samples 2" in first.stderr
    assert sorted(bad_records(recipe)) == sorted(BAD)
    stopped_at = rows(recipe)[-1]["samples"]
    # It continues from the last step before, and the samples that it has met before count.
    second = run(train_command(recipe, *limit), expect=1)
    assert f"({stopped_at:,.0f} samples)" in second.stdout
    assert "3 samples could not be read" in second.stderr
    train(recipe, "data.bad_samples=skip", "data.max_bad_samples=3")
    assert len(losses(recipe.parent / "runs" / "tiny")) == NUM_STEPS
    assert rows(recipe)[-1]["data/bad_samples"] == 3


def test_without_leave_the_first_one_ends_the_run(recipe: Path) -> None:
    finished = run(train_command(recipe), expect=2)
    assert "its checksum is wrong" in finished.stderr
    assert "pomscale data repair" in finished.stderr


def test_what_was_saved_before_the_error_is_kept(recipe: Path) -> None:
    for record in BAD[:2]:
        flip_bit(recipe.parent / "latents" / "train", record)  # whole again
    checkpoints = ["data.prefetch=1", "data.num_threads=1", "checkpoint.every_samples=32"]
    finished = run(train_command(recipe, *checkpoints), expect=2)
    assert "its checksum is wrong" in finished.stderr
    folder = recipe.parent / "runs" / "tiny"
    assert find_checkpoint(folder).name == f"samples-{rows(recipe)[-1]['samples']:012.0f}"


def test_bad_held_out_samples_do_not_count(digits: Path, tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, digits)
    shutil.copytree(digits / "latents" / "heldout", tmp_path / "heldout")
    for record in (0, 5):
        flip_bit(tmp_path / "heldout", record)
    validation = (
        f"validation={{path: {tmp_path}/heldout, every_samples: 320, num_samples: 40, batch: 8, num_time_bins: 20}}"
    )
    short = [validation, "training.total_samples=320", "schedule.cooldown_samples=0"]
    failed = run(train_command(recipe, *short), expect=2)
    assert "its checksum is wrong" in failed.stderr
    assert checkpoint_samples(tmp_path / "runs" / "tiny") == 320  # saved before the validation that failed
    train(recipe, *short, "data.bad_samples=skip", "name=skipped", num_processes=2)
    logged = (tmp_path / "runs" / "skipped" / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, logged) if "validation/loss" in row]
    assert row["validation/bad_samples"] == 2
    by_bin = [row[f"validation/loss_bin_{i:02d}"] for i in range(20)]
    weights = [1 if i in (0, 5) else 2 for i in range(20)]
    expected = sum(loss * weight for loss, weight in zip(by_bin, weights, strict=True)) / 38
    assert row["validation/loss"] == pytest.approx(expected)


def test_a_damaged_index_is_refused(recipe: Path) -> None:
    index = np.load(recipe.parent / "latents" / "train" / "index.npy", mmap_mode="r+")
    index["label"][0] ^= 1  # another class that there is
    index.flush()
    refused = run(train_command(recipe, num_processes=2), expect=1)
    assert "index.npy: its checksum is not that of the manifest" in refused.stderr
