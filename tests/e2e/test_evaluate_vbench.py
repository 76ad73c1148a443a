"""`pomscale evaluate vbench` records VBench's results in the run folder, at the samples of the videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pomscale.evaluation.vbench import DIMENSIONS, read_results
from pomscale.runs.evaluation_log import read_evaluations
from pomscale.sampling.vbench_suite import MANIFEST
from support.running import Finished, pomscale

RECIPE = """
kind: train
name: digits
codec: {name: pixel, channels: 1}
data: {path: nowhere}
model: {latent_shape: [4, 4, 4], num_classes: 10, dim: 32, depth: 2}
training: {total_samples: 64, global_batch: 8}
checkpoint: {every_samples: 32}
monitoring: {wandb: {mode: disabled}}
"""


def evaluate(run: Path, *words: str | Path, expect: int = 0) -> Finished:
    return pomscale("evaluate", "vbench", run, *words, expect=expect)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_the_command_records_at_the_samples_of_the_videos(run: Path, tmp_path: Path) -> None:
    results = tmp_path / "r_eval_results.json"
    results.write_text(json.dumps({key: [0.5, [{"video_path": "./videos/a cat-0.mp4"}]] for key in DIMENSIONS}))
    figures = read_results([results]).figures
    videos = tmp_path / "films"
    videos.mkdir()
    manifest: dict[str, Any] = {"model": {"run": "digits", "samples": 48}, "sampling": {}, "videos": {}}
    (videos / MANIFEST).write_text(json.dumps(manifest))
    done = evaluate(run, results, "--videos", videos)
    assert done.stderr == ""
    assert f"{'total':40}{figures['total']:.2%}" in done.stdout
    assert f"recorded at 48 samples of {run}" in done.stdout
    evaluate(run, results, "--samples", "64")
    first, second = read_evaluations(run)
    assert (first.samples, second.samples) == (48, 64)
    assert first.metrics == {f"evaluation/vbench/{name}": value for name, value in figures.items()}
    for model, message in (
        ({"run": "other", "samples": 48}, "videos of run 'other'"),
        ({"run": "digits"}, "--samples"),
    ):
        (videos / MANIFEST).write_text(json.dumps(manifest | {"model": model}))
        done = evaluate(run, results, "--videos", videos, expect=2)
        assert done.stdout == ""
        assert message in done.stderr
    assert len(read_evaluations(run)) == 2
