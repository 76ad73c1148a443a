"""`pomscale bench network` measures pictures and clips, and refuses to generate what is not made group by group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.benchmarks.network import bench_network
from pomscale.cli import main
from pomscale.config.load import load_train_recipe

CPU = torch.device("cpu")


def test_the_command_measures_forward_and_training_per_sample(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    changes = ["model.dim=32", "model.depth=2", "model.latent_shape=[4,8,8]"]
    options = ["--device", "cpu", "--batch", "2", "--num-turns", "1", "--out", str(out)]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "network", "quickstart", *changes, *options])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["num_tokens"] == 64
    assert row["forward_s_per_sample"] > 0
    assert row["training_s_per_sample"] > 0


def test_clips_are_generated_group_by_group() -> None:
    recipe = load_train_recipe("quickstart-video", ["model.dim=32", "model.depth=1", "model.mixer=attention"])
    report = bench_network(recipe, CPU, batch=1, num_turns=1, num_groups=3)
    assert report.rows[1]["num_groups"] == 3
    assert report.rows[1]["total_s"] >= report.rows[1]["last_group_s"] > 0


def test_pictures_have_no_groups_to_generate() -> None:
    with pytest.raises(InputError, match=r"--generate: only clips with model\.temporal"):
        bench_network(load_train_recipe("quickstart"), CPU, batch=1, num_turns=1, num_groups=3)
