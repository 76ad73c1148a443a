"""The life of models in the coefficient form (PoM v2): they train, go on, are exported and drawn from, as v1 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pomscale
from pomscale.config.load import load_train_recipe
from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
from pomscale.pretrained.weights import export
from pomscale.sampling.stream import ClipStream
from pomscale.training.run import train
from support.running import GLOBAL_BATCH, losses
from support.video_run import make_clips, write_video_recipe

HALF, ALL = 4 * GLOBAL_BATCH, 8 * GLOBAL_BATCH


def train_here(recipe: Path, name: str, num_samples: int, mixer: str) -> Path:
    """Train in this process, from the newest checkpoint of the run if there is one; returns the run folder."""
    loaded = load_train_recipe(
        recipe,
        [
            f"name={name}",
            f"model.mixer={mixer}",
            f"training.total_samples={num_samples}",
            "schedule={warmup_samples: 0, cooldown_samples: 0}",
            f"checkpoint.every_samples={HALF}",
            "faults={preflight: false, hang_timeout_s: null}",
        ],
    )
    assert train(loaded) == 0
    return Path(loaded.output) / loaded.name


def check_goes_on_and_is_exported(recipe: Path, mixer: str, tmp_path: Path) -> Path:
    whole = train_here(recipe, "whole", ALL, mixer)
    for num_samples in (HALF, ALL):
        halves = train_here(recipe, "halves", num_samples, mixer)
    assert losses(halves) == losses(whole)
    assert len(set(losses(whole).values())) == ALL // GLOBAL_BATCH
    export(whole, tmp_path / "exported")
    model, again = load_pretrained(whole), load_pretrained(tmp_path / "exported")
    assert model.config.has_rope
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))
    return tmp_path / "exported"


def test_pictures(tiny_recipe: Path, tmp_path: Path) -> None:
    mixer = "{kind: pom, form: coefficients, degree: 3, heads: 8, groups: 2, rope: true}"
    model = load_pretrained(check_goes_on_and_is_exported(tiny_recipe, mixer, tmp_path))
    drawn = pomscale.sample(model, torch.arange(2), num_steps=3, guidance=1.0, seeds=range(2))
    assert drawn.shape == (2, 4, 4, 4)
    assert torch.isfinite(drawn).all()


@pytest.mark.slow
def test_clips(tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, make_clips(tmp_path))
    mixer = "[{kind: pom, form: coefficients, heads: 8, rope: true}, {kind: pom, form: coefficients}]"
    model = load_pretrained(check_goes_on_and_is_exported(recipe, mixer, tmp_path))
    assert isinstance(model, PretrainedVDiPoM)
    stream = ClipStream(model, ["a red bar", "a green bar"], [1, 2], num_groups=2, num_steps=3)
    whole = pomscale.sample(model, ["a red bar", "a green bar"], num_steps=3, seeds=[1, 2], num_frames=4)
    torch.testing.assert_close(torch.cat(list(stream), dim=2), whole, rtol=1e-4, atol=1e-4)
