"""An aligned run from raw pictures on: it goes on after a stop, and its weights serve with and without projection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pomscale.pretrained.load import load_pretrained
from pomscale.pretrained.weights import export, open_weights
from pomscale.runs.layout import METRICS_FILE
from support.feature_sets import encode_features, encode_pixels, write_grey
from support.running import losses, run, train_command

pytestmark = pytest.mark.slow

ALIGNED = [
    "model.alignment={block: 1, dim: 64, hidden: 24}",
    "diffusion.alignment={weight: 0.5, until_samples: 40}",
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    pictures = write_grey(tmp_path / "pictures", 20)
    encode_pixels(pictures, tmp_path / "pixels")
    encode_features(pictures, tmp_path / "features")
    recipe = tmp_path / "aligned.yaml"
    recipe.write_text(
        f"""
kind: train
name: whole
output: {tmp_path}/runs
codec: {{name: uint8, channels: 1}}
data: {{path: {tmp_path}/pixels, features: {tmp_path}/features}}
model: {{latent_shape: [1, 8, 8], num_classes: 2, patch_size: 2, dim: 16, depth: 2, num_heads: 2}}
training: {{total_samples: 48, global_batch: 8}}
compute: {{precision: fp32, device: cpu}}
ema: {{halflives_samples: [20]}}
checkpoint: {{every_samples: 24}}
monitoring: {{every_samples: 8, wandb: {{mode: disabled}}}}
faults: {{preflight: false}}
"""
    )
    return recipe


def alignment_losses(folder: Path) -> list[float | None]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [row.get("train/alignment_loss") for row in rows if "train/loss" in row]


def test_a_run_on_two_processes_its_export_and_further_training(recipe: Path, tmp_path: Path) -> None:
    runs, exported = tmp_path / "runs", tmp_path / "exported"
    run(train_command(recipe, *ALIGNED))
    run(train_command(recipe, *ALIGNED, "name=two", num_processes=2))
    assert list(losses(runs / "two").values()) == pytest.approx(list(losses(runs / "whole").values()), rel=1e-5)
    aligned = alignment_losses(runs / "whole")
    assert aligned[:5] == pytest.approx(alignment_losses(runs / "two")[:5], rel=1e-5)
    assert aligned[5] is None  # samples 41 to 48 are not aligned

    export(runs / "whole", exported)
    assert open_weights(exported).card.model.alignment is None
    served, trained = (load_pretrained(folder) for folder in (exported, runs / "whole"))
    assert not [name for name, _ in served.named_parameters() if name.startswith("alignment")]
    x, t, classes = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(served(x, t, classes), trained(x, t, classes))

    said = run(train_command(recipe, *ALIGNED, "name=further", f"init_from.path={exported}")).stdout
    assert "the projection for the alignment loss is new" in said
    plain = ["data.features=null", "name=plain", f"init_from.path={runs / 'whole'}", "training.total_samples=8"]
    run(train_command(recipe, *plain, "checkpoint.every_samples=8"))
    assert not any(alignment_losses(runs / "plain"))
