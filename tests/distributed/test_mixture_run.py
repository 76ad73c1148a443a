"""A run on two datasets: the same losses on any layout, epochs logged for each, and no resuming with other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.running import (
    GLOBAL_BATCH,
    NUM_STEPS,
    assert_same_curve,
    losses,
    rows,
    run,
    train,
    train_command,
    write_tiny_recipe,
)


@pytest.mark.slow
def test_a_mixture_trains_alike_on_any_layout(digits: Path, tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, digits)
    latents = digits / "latents"
    mixture = "data.mixture=[{{path: {0}/train, weight: 3}}, {{path: {0}/heldout, weight: {1}}}]"
    data = ["data.path=null", mixture.format(latents, 1)]
    train(recipe, *data)
    train(recipe, *data, "name=two", "training.micro_batch=5", num_processes=2)
    runs = tmp_path / "runs"
    assert_same_curve(losses(runs / "two"), losses(runs / "tiny"))

    last = [row for row in rows(runs / "tiny") if "data/epoch/train" in row][-1]
    num_samples = {half: json.loads((latents / half / "manifest.json").read_text())["num_samples"] for half in
                   ("train", "heldout")}  # fmt: skip
    seen = {half: last[f"data/epoch/{half}"] * count for half, count in num_samples.items()}
    assert sum(seen.values()) == pytest.approx(NUM_STEPS * GLOBAL_BATCH)
    assert seen["train"] / seen["heldout"] == pytest.approx(3, rel=0.2)

    refused = run(train_command(recipe, "data.path=null", mixture.format(latents, 2)), expect=2)
    assert "data.mixture: shares of the samples [0.75, 0.25] then, [0.6, 0.4] now" in refused.stderr
