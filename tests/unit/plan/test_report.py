"""The report of a plan: batches, speed, storage, what is refused or noted, and the shipped recipes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.config.hardware import GPUS
from pomscale.config.load import load_train_recipe
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import micro_batch_positions, num_micro_batches
from pomscale.engine.matrices import block_matrices
from pomscale.models import make_model
from pomscale.plan.advice import changed
from pomscale.plan.batch import BatchShare, batch_share
from pomscale.plan.checks import check_layout
from pomscale.plan.memory import state_bytes
from pomscale.plan.model_cost import forward_flops, num_parameters
from pomscale.plan.report import DatasetSize, plan, render
from pomscale.plan.speed import speed
from pomscale.plan.storage import storage
from support.paths import RECIPES
from support.tiny_plans import tiny


@pytest.mark.parametrize(
    ("global_batch", "num_gpus", "micro_batch"), [(256, 8, None), (250, 8, 7), (250, 24, 4), (9, 8, 1)]
)
def test_batches_are_dealt_as_the_loader_does(global_batch: int, num_gpus: int, micro_batch: int | None) -> None:
    training = {"total_samples": global_batch, "global_batch": global_batch, "micro_batch": micro_batch}
    recipe = tiny(training=training)
    share = batch_share(recipe, num_gpus)
    assert share == batch_share(changed(recipe, {"mesh.sp": 3}), 3 * num_gpus)
    assert share.num_micro_batches == num_micro_batches(global_batch, num_gpus, micro_batch)
    largest = 0
    for rank in range(num_gpus):
        pieces = micro_batch_positions(
            0, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=num_gpus
        )
        largest = max(largest, *(len(next(pieces)[0]) for _ in range(share.num_micro_batches)))
    assert share == BatchShare(largest, share.num_micro_batches)


def test_a_packed_step_is_counted_in_samples_of_the_latent_shape() -> None:
    """Budgets of so many whole samples give the plan of a global batch of them."""
    batches = tiny(training={"total_samples": 960, "global_batch": 24, "micro_batch": 3})
    tokens = batches.model.num_tokens
    budgets = {"global_batch": None, "global_tokens": 24 * tokens, "micro_tokens": 3 * tokens}
    packed = tiny(training=budgets)
    assert packed.samples_per_step == 24
    assert batch_share(packed, 4) == batch_share(batches, 4) == BatchShare(3, 2)
    assert speed(packed, 4, GPUS["h100"], 0.4) == speed(batches, 4, GPUS["h100"], 0.4)
    assert batch_share(changed(packed, {"training.micro_tokens": None}), 4) == BatchShare(6, 1)
    larger = tiny(training=budgets | {"global_tokens": 25 * tokens - 1})
    assert larger.samples_per_step == 24
    assert batch_share(larger, 4) == BatchShare(3, 3), "a part of a sample is rounded up"
    lines = render(plan(packed, num_nodes=1, gpus_per_node=4, gpu="h100"))
    assert f"{24 * tokens} tokens, of 24 such samples: up to 2 x 3 per GPU" in lines
    with pytest.raises(InputError, match=r"training.global_tokens: .* are 24 samples .* which 25 ranks cannot share"):
        check_layout(packed, 25)


def test_recomputation_costs_time_and_lowers_mfu() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-xl-2.yaml")
    plain = speed(recipe, 16, GPUS["h100"], 0.4)
    assert plain.samples_per_s == pytest.approx(0.4 * 16 * 989e12 / (3 * 305e9), rel=0.01)
    again = speed(changed(recipe, {"compute.activation_checkpointing": "full"}), 16, GPUS["h100"], 0.4)
    assert plain.mfu == 0.4
    assert again.mfu == pytest.approx(0.3, rel=0.01)
    assert again.days(10**8) == pytest.approx(plain.days(10**8) * 4 / 3, rel=0.01)


def test_muon_takes_time_and_spares_memory() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-b-2.yaml")
    muon = load_train_recipe(RECIPES / "image" / "dipom-b-2.yaml", ["optimizer.name=muon"])
    flops, batch = 3 * forward_flops(recipe.model), recipe.training.global_batch
    without, on_one, on_many = (speed(r, n, GPUS["h100"], 0.4) for r, n in ((recipe, 1), (muon, 1), (muon, 8)))
    assert without.optimizer_share == 0
    assert on_one.optimizer_share == pytest.approx(3.26e12 / (3.26e12 + batch * flops), rel=0.01)
    assert on_one.step_time_s == pytest.approx(without.step_time_s / (1 - on_one.optimizer_share))
    assert on_many.optimizer_share == pytest.approx(on_one.optimizer_share, rel=0.1)  # an eighth of both
    assert state_bytes(recipe) - state_bytes(muon) == 4 * num_matrix_elements(recipe)
    assert "Muon 3.26 TFLOP per step" in render(plan(muon, num_nodes=1, gpus_per_node=8, gpu="h100"))


def num_matrix_elements(recipe: TrainRecipe) -> int:
    with torch.device("meta"):
        network = make_model(recipe.model)
    return sum(network.get_parameter(name).numel() for name in block_matrices(network))


def test_storage_counts_what_is_kept() -> None:
    recipe = tiny(
        training={"total_samples": 48000, "global_batch": 48},
        checkpoint={"every_samples": 4800, "keep_last": 2, "keep_every_samples": 24000, "keep_best": 1},
        ema={"post_hoc": {"every_samples": 9600, "widths": [0.05, 0.1]}},
        validation={"path": "heldout", "every_samples": 4800},
    )
    parameters, disk = num_parameters(recipe.model), storage(recipe)
    assert (disk.num_checkpoints, disk.num_ema_snapshots) == (2 + 1 + 1 + 2, 5)
    assert disk.checkpoint == parameters * 4 * (1 + 2 + 3)
    assert disk.total == 6 * disk.checkpoint + 5 * 2 * 4 * parameters


def test_what_does_not_fit_together_is_refused_or_noted() -> None:
    def of(recipe: TrainRecipe, **machine: Any) -> Any:
        return plan(recipe, **{"num_nodes": 3, "gpus_per_node": 8, "gpu": "a100", **machine})

    with pytest.raises(InputError, match=r"fsdp2\.shard_size: 24 ranks do not make whole copies of 16"):
        of(tiny(fsdp2={"shard_size": 16}))
    with pytest.raises(InputError, match=r"training\.global_batch: 8 samples cannot be shared by 24 ranks"):
        of(tiny(training={"global_batch": 8, "total_samples": 80}))
    with pytest.raises(InputError, match=r"mesh\.sp: 24 ranks do not make whole groups of 5"):
        of(tiny(mesh={"sp": 5}))
    with pytest.raises(InputError, match=r"training\.global_batch: 3 samples cannot be shared by 6 groups of 4 ranks"):
        of(tiny(mesh={"sp": 4}, training={"global_batch": 3, "total_samples": 30}))
    with pytest.raises(InputError, match=r"compute\.float8: A100"):
        of(tiny(compute={"float8": True}))
    with pytest.raises(InputError, match="v100"):
        of(tiny(), gpu="v100")
    noted = of(tiny(training={"global_batch": 100, "total_samples": 1000}, fsdp2={"shard_size": 12})).notes
    assert [note.split(":")[0] for note in noted] == ["training.global_batch", "fsdp2.shard_size"]


def test_report_gives_the_nominal_flops_where_they_differ() -> None:
    for name, expected in (
        ("dipom-v2-xl-2", "191 GFLOP per sample and forward pass; 229 GFLOP nominal, with the output maps applied to"),
        ("dipom-xl-2", "305 GFLOP per sample and forward pass\n"),
    ):
        recipe = load_train_recipe(RECIPES / "image" / f"{name}.yaml")
        made = plan(recipe, num_nodes=1, gpus_per_node=2, gpu="h200")
        assert expected in render(made)
        flops = forward_flops(recipe.model)
        assert made.speed.samples_per_s == pytest.approx(0.4 * 2 * 989e12 / (3 * flops), rel=1e-3)


def test_report_is_a_table_that_ends_in_a_verdict() -> None:
    recipe = load_train_recipe(RECIPES / "image" / "dipom-xl-2-512.yaml", ["training.micro_batch=null"])
    made = plan(recipe, num_nodes=1, gpus_per_node=2, gpu="h100", dataset=DatasetSize(1_281_167, 40 * 2**30))
    text = render(made)
    lines = text.splitlines()
    assert not made.fits
    assert lines[-1].startswith("NO FIT    cheapest change that fits: training.micro_batch=")
    assert "833 M parameters" in text
    assert "1.28 M samples, 40.0 GiB, seen 79.9 times" in text
    assert all(len(line) <= 120 for line in lines)
    start, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("memory  ", "peak per GPU"))
    table = [float(line[30:38]) for line in lines[start:end]]
    assert math.fsum(table) == pytest.approx(float(lines[end][30:38]), rel=0.01)
    assert float(lines[end][30:38]) == pytest.approx(made.memory.peak / 2**30, abs=0.01)
    larger = plan(recipe, num_nodes=8, gpus_per_node=8, gpu="h200")
    assert larger.fits
    assert render(larger).splitlines()[-1].startswith("FITS")


def test_report_of_clips() -> None:
    causal, forcing = (
        plan(load_train_recipe(RECIPES / "video" / f"{name}.yaml"), num_nodes=1, gpus_per_node=8, gpu="h200")
        for name in ("vdipom-xl-2-causal", "vdipom-xl-2-forcing")
    )
    assert "model     1.16 G parameters, 3600 tokens in 10 frame groups with 120 of text, 5.38 TFLOP" in render(causal)
    # A t for every frame group: so many times is the text modulated and projected.
    assert "5.62 TFLOP" in render(forcing)
    assert forcing.speed.samples_per_s < causal.speed.samples_per_s
    assert forcing.memory.peak > causal.memory.peak


# tests/unit/experiments/test_points.py plans the trainings of experiments.
_TRAININGS = [path for path in sorted(RECIPES.glob("[!dp]*/*.yaml")) if "kind: experiment" not in path.read_text()]


@pytest.mark.parametrize("recipe", _TRAININGS, ids=lambda path: path.stem)
def test_every_training_recipe_fits_on_a_node_of_h100s(recipe: Path) -> None:
    made = plan(load_train_recipe(recipe), num_nodes=1, gpus_per_node=8, gpu="h100")
    assert made.fits, render(made)


def test_planning_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from pomscale.config.load import load_train_recipe;"
        "from pomscale.plan.report import plan, render;"
        "render(plan(load_train_recipe(sys.argv[1]), num_nodes=1, gpus_per_node=8, gpu='h100'));"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    recipe = RECIPES / "image" / "dipom-xl-2.yaml"
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
