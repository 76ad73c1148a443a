"""Training on captioned pictures of two sizes: the same losses by any engine, on any layout; what is left to use."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.config.load import load_train_recipe
from pomscale.config.train import InitFromConfig
from pomscale.data.mixture import Mixture
from pomscale.evaluation.heldout import measure_heldout
from pomscale.plan.model_cost import training_flops
from pomscale.pretrained.load import PretrainedDiPoM, load_pretrained
from pomscale.pretrained.weights import export
from pomscale.sampling.api import sample
from pomscale.shards.schema import read_manifest
from pomscale.training.build import mean_flops, open_inputs
from pomscale.training.initial_weights import fine_tuning
from pomscale.training.run import train as train_here
from support.digits import make_digits
from support.running import GLOBAL_BATCH, assert_same_curve, losses, rows, train
from support.text_picture_run import MAX_LENGTH, SIZES, make_captioned_pictures, write_text_picture_recipe

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FEW = 10  # steps of runs of several ranks
FEWER = f"training.total_samples={FEW * GLOBAL_BATCH}"
IN_CONTEXT = ["model.text=in_context", "model.text_start=1"]
PROMPTS = "prompts: [red bars, violet bars and no more]"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioned_pictures(tmp_path_factory.mktemp("pictures"))


def train_alone(recipe: Path, *overrides: str) -> Path:
    """In this process; returns the run folder."""
    loaded = load_train_recipe(recipe, [*overrides, "faults.preflight=false", "faults.hang_timeout_s=null"])
    assert train_here(loaded) == 0
    return Path(loaded.output) / loaded.name


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With validation and pictures of two prompts at the end."""
    recipe = write_text_picture_recipe(tmp_path_factory.mktemp("alone"), pictures)
    total = load_train_recipe(recipe).training.total_samples
    return train_alone(
        recipe,
        f"validation={{path: {pictures}/latents, every_samples: {total}, batch: 4}}",
        f"sampling={{every_samples: {total}, {PROMPTS}, num_each: 3, num_steps: 3, guidance: 1.5}}",
    )


@pytest.fixture(scope="module")
def in_context(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_text_picture_recipe(tmp_path_factory.mktemp("context"), pictures)
    return train_alone(recipe, *IN_CONTEXT, FEWER)


def test_it_learns_from_both_sizes_validates_and_draws_a_row_per_prompt(alone: Path, pictures: Path) -> None:
    shapes = [group.shape for group in read_manifest(pictures / "latents").groups]
    assert sorted(shapes) == [(12, 6, 10), (12, 8, 8)]
    curve = list(losses(alone).values())
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])
    (validated,) = (row for row in rows(alone) if "validation/loss" in row)
    assert math.isfinite(validated["validation/loss"])
    assert validated["validation/bad_samples"] == 0
    (grid,) = (alone / "samples").iterdir()
    with Image.open(grid) as drawn:
        assert drawn.height * 3 == pytest.approx(
            drawn.width * 2, abs=8
        )  # two rows of three, and the lines between them
    measured, _ = measure_heldout(
        alone, data=None, text=None, num_samples=None, num_time_bins=None, weights="ema", device="cpu"
    )
    assert measured.mean == pytest.approx(validated["validation/loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        (2, ["training.micro_batch=5"]),
        pytest.param(2, ["mesh.sp=2"], marks=pytest.mark.exhaustive),
        pytest.param(
            2, ["engine=deepspeed", "deepspeed.zero_stage=2"], marks=[needs_deepspeed, pytest.mark.exhaustive]
        ),
        pytest.param(
            2, ["engine=deepspeed", "deepspeed.zero_stage=3"], marks=[needs_deepspeed, pytest.mark.exhaustive]
        ),
    ],
    ids=["micro-batches", "split tokens", "zero-2", "zero-3"],
)
def test_layouts_and_engines_agree(
    alone: Path, pictures: Path, tmp_path: Path, num_processes: int, overrides: list[str]
) -> None:
    recipe = write_text_picture_recipe(tmp_path, pictures)
    train(recipe, *overrides, FEWER, num_processes=num_processes)
    assert_same_curve(losses(tmp_path / "runs" / "pictures"), losses(alone), FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.sp=2"],
        pytest.param(["engine=deepspeed", "deepspeed.zero_stage=3"], marks=[needs_deepspeed, pytest.mark.exhaustive]),
    ],
    ids=["split tokens", "zero-3"],
)
def test_layouts_agree_on_texts_in_context(
    in_context: Path, pictures: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """With split tokens the first rank alone has those of the text."""
    recipe = write_text_picture_recipe(tmp_path, pictures)
    train(recipe, *IN_CONTEXT, *overrides, FEWER, num_processes=2)
    assert_same_curve(losses(tmp_path / "runs" / "pictures"), losses(in_context), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cross", pytest.param("in_context", marks=pytest.mark.exhaustive)])
def test_activation_checkpointing_changes_no_bit(pictures: Path, tmp_path: Path, way: str) -> None:
    recipe, total = write_text_picture_recipe(tmp_path, pictures), f"training.total_samples={4 * GLOBAL_BATCH}"
    overrides = [f"model.text={way}", total, "schedule.warmup_samples=0"]
    plain = train_alone(recipe, *overrides, "name=plain")
    assert losses(train_alone(recipe, *overrides, "compute.activation_checkpointing=full")) == losses(plain)


def test_what_is_left_can_be_exported_sampled_from_and_trained_further(
    alone: Path, in_context: Path, tmp_path: Path
) -> None:
    export(alone, tmp_path / "exported", weights="ema")
    model, exported = (load_pretrained(path, device="cpu") for path in (alone, tmp_path / "exported"))
    assert isinstance(exported, PretrainedDiPoM)
    assert exported.card.texts.dim == exported.config.text_dim == 16
    drawn = [sample(one, ["blue bars", "red bars"], seeds=[1, 2], num_steps=3) for one in (model, exported)]
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0], sample(model, ["red bars", "red bars"], seeds=[1, 2], num_steps=3)[:1])
    here, there = (load_pretrained(path, device="cpu").card.model for path in (alone, in_context))
    taken = fine_tuning(InitFromConfig(path=str(alone)), here, (), 0)
    assert taken.note.startswith("initial weights: ")
    with pytest.raises(InputError, match=r"model\.text: cross there, in_context here; model\.text_start: 0 there, 1"):
        fine_tuning(InitFromConfig(path=str(alone)), there, (), 0)


def test_data_that_does_not_fit_is_refused(pictures: Path, tmp_path: Path) -> None:
    recipe = write_text_picture_recipe(tmp_path, pictures)

    def opened(*overrides: str) -> None:
        open_inputs(load_train_recipe(recipe, list(overrides)), tmp_path)

    opened()
    with pytest.raises(InputError, match=r"text embeddings have 16 values per token, but model.text_dim is 17"):
        opened("model.text_dim=17")
    with pytest.raises(
        InputError, match=r"that is 16 tokens, and model.latent_shape .* of the largest pictures says 12"
    ):
        opened("model.latent_shape=[12, 6, 8]")
    with pytest.raises(InputError, match=r"mesh\.sp: 16 ranks cannot share the 15 tokens of samples of shape 12x6x10"):
        opened("mesh.sp=16")
    make_digits(tmp_path)
    captionless = [f"data.path={tmp_path}/latents/train", "codec={name: pixel, block: 2, channels: 1}"]
    with pytest.raises(InputError, match=r"has no text embeddings; encode them with a `text` section in its recipe"):
        opened(*captionless, "model.latent_shape=[4, 4, 4]")


def test_texts_may_lie_in_a_companion_set(alone: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "latents", tmp_path / "texts")
    recipe, total = write_text_picture_recipe(tmp_path, pictures), 6 * GLOBAL_BATCH
    folder = train_alone(recipe, f"data.text={tmp_path}/texts", f"training.total_samples={total}")
    for samples, loss in losses(folder).items():
        assert loss == losses(alone)[samples]


def test_flops_are_those_of_the_sizes_that_there_are(pictures: Path, tmp_path: Path) -> None:
    for overrides in ([], IN_CONTEXT):
        recipe = load_train_recipe(write_text_picture_recipe(tmp_path, pictures), overrides)
        mixture = Mixture.open(recipe.data, seed=0, global_batch=GLOBAL_BATCH, read_text=True)
        of_size = {
            size: training_flops(
                recipe.model.model_copy(update={"latent_shape": (12, size[0] // 2, size[1] // 2)}),
                text_length=MAX_LENGTH,
            )
            for size in set(SIZES)
        }
        expected = sum(of_size[size] for size in SIZES) / len(SIZES)
        assert mean_flops(recipe, mixture) == pytest.approx(expected)
