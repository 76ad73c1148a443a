"""Real runs of three seeds make a reference: a fourth seed stays inside, and a wrong learning rate does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import GLOBAL_BATCH, pomscale, train

STEPS = 20


@pytest.mark.exhaustive  # seven trainings; tests/unit/monitoring/test_reference.py has the rules
def test_a_wrong_learning_rate_leaves_the_band_and_another_seed_does_not(tiny_recipe: Path, digits: Path) -> None:
    validation = f"{{path: {digits}/latents/heldout, every_samples: {4 * GLOBAL_BATCH}, num_samples: 64, batch: 64}}"
    tiny_recipe.write_text(f"{tiny_recipe.read_text()}validation: {validation}\n")

    def trained(name: str, *overrides: str) -> Path:
        train(tiny_recipe, f"name={name}", f"training.total_samples={STEPS * GLOBAL_BATCH}", *overrides)
        return tiny_recipe.parent / "runs" / name

    reference = tiny_recipe.parent / "tiny-reference.json"
    seeds = [trained(f"seed-{seed}", f"seed={seed}") for seed in range(3)]
    pomscale("report", *seeds, "--write-reference", reference)
    wrong = trained("wrong", "seed=3", "optimizer.lr=3e-5")
    inside = pomscale("report", *seeds, trained("seed-3", "seed=3"), "--against", reference, "--out", seeds[0].parent)
    assert inside.stdout.count("stays inside the band of tiny-reference") == 4
    refused = pomscale("report", wrong, "--against", reference, expect=2)
    assert "optimizer.lr: 0.003 there, 3e-05 here" in refused.stderr
    outside = pomscale("report", wrong, "--against", reference, "--other-recipe", expect=1)
    assert "validation/loss: OUTSIDE from" in outside.stdout
    assert "spreads above" in outside.stdout
