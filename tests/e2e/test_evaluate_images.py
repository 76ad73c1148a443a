"""`pomscale evaluate images` of a real run: figures with their settings in its record, and bad input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pomscale.runs.evaluation_log import read_evaluations
from support.generated_pictures import make_pixels, write_folder
from support.running import pomscale, train
from support.synthetic_dataset import change_manifest

OPTIONS = ("--extractor", "pixels", "--num-samples", "32", "--steps", "2", "--device", "cpu")


@pytest.fixture
def run(tiny_recipe: Path) -> Path:
    """A run of two steps, with one average."""
    train(
        tiny_recipe,
        "training.total_samples=64",
        "schedule.warmup_samples=0",
        "schedule.cooldown_samples=0",
        "checkpoint.every_samples=64",
    )
    return tiny_recipe.parent / "runs" / "tiny"


def test_a_run_is_measured(run: Path, digits: Path, tmp_path: Path) -> None:
    reference = digits / "latents" / "heldout"
    command = ("evaluate", "images", run, "--reference", reference, *OPTIONS, "--work", tmp_path / "work")
    planned = pomscale(*command, "--dry-run").stdout
    assert "metrics: fid, precision, recall, density, coverage, kid" in planned
    assert "left out: sfid: needs spatial features" in planned
    assert "warning: fid of 32 pictures is biased upwards" in planned
    assert not (tmp_path / "work").exists()
    done = pomscale(*command, "--json", tmp_path / "out.json", "--guidance", "1")
    assert f"recorded at 64 samples of {run}" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    (evaluation,) = read_evaluations(run)
    assert evaluation.samples == 64
    assert evaluation.metrics == {f"evaluation/images/{name}": value for name, value in result["metrics"].items()}
    assert result["settings"]["checkpoint"]["average"]["name"] == "halflife-200"
    assert result["settings"]["sampling"]["guidance"] == 1.0
    assert result["settings"]["reference"]["pictures"]["kind"] == "shards"
    # A result is there: nothing is measured or recorded again.
    again = pomscale(*command, "--guidance", "1")
    assert again.stderr == ""
    assert done.stdout.startswith("recorded")
    assert again.stdout == done.stdout.split("\n", 1)[1]
    assert len(read_evaluations(run)) == 1
    # A result that was not recorded, or under another name, is recorded then.
    pomscale(*command, "--guidance", "1", "--name", "other", "--no-record")
    assert "recorded at 64 samples" in pomscale(*command, "--guidance", "1", "--name", "other").stdout
    assert [one.curves for one in read_evaluations(run)] == [["images"], ["other"]]


def test_bad_input_is_one_line(run: Path, digits: Path, tmp_path: Path) -> None:
    other = shutil.copytree(digits / "latents" / "heldout", tmp_path / "other")
    change_manifest(other, "transform", "filter", value="area")
    colours = write_folder(tmp_path / "colours", make_pixels(9, (8, 8, 3)))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    for words, message in (
        (
            ("--reference", other),
            "cropped otherwise than the model's training pictures (filter area there, lanczos here",
        ),
        (("--reference", colours), "compare grey ones as three equal channels with --grey repeat"),
        (("--reference", colours, "--classes", "3,10"), "classes [3, 10] are asked for, and the model has 0..9"),
        (("--reference", colours, "--weights", "halflife-7"), "has no weights 'halflife-7'"),
        (("--reference", tmp_path / "wide.npz"), "width"),
        (
            ("--reference", digits / "latents" / "heldout", "--metrics", "fdd"),
            "--metrics fdd: needs --extractor dinov2:FOLDER",
        ),
        (("--reference", tmp_path / "nowhere"), "there is no such file or folder"),
    ):
        done = pomscale("evaluate", "images", run, *words, *OPTIONS, "--work", tmp_path / "work", expect=2)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
