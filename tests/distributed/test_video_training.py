"""Training on clips of several lengths and pictures, with texts: the same losses by any engine, on any layout."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from running import GLOBAL_BATCH, NUM_STEPS, assert_same_curve, losses, rows, train
from video_run import NUM_FRAMES, make_clips, write_video_recipe

from pomscale.config.recipe import load_train_recipe
from pomscale.data.mixture import Mixture
from pomscale.data.schema import read_manifest
from pomscale.plan.model_cost import training_flops
from pomscale.train import mean_flops
from pomscale.train import train as train_here

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FORCING = "diffusion.time.per_frame_group=true"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"))


def train_alone(recipe: Path, *overrides: str) -> Path:
    """In this process; returns the run folder."""
    loaded = load_train_recipe(recipe, [*overrides, "faults.preflight=false", "faults.hang_timeout_s=null"])
    assert train_here(loaded) == 0
    return Path(loaded.output) / loaded.name


@pytest.fixture(scope="module")
def alone(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(write_video_recipe(tmp_path_factory.mktemp("alone"), clips))


def test_it_learns_from_all_buckets(alone: Path, clips: Path) -> None:
    shapes = [group.shape for group in read_manifest(clips / "latents").groups]
    assert sorted(shapes) == [(4, 1, 6, 8), (4, 2, 6, 8), (4, 4, 6, 8)]
    curve = losses(alone)
    assert sum(list(curve.values())[-10:]) < 0.99 * sum(list(curve.values())[:10])  # most of it is noise
    last = [row for row in rows(alone) if "data/epoch" in row][-1]
    assert last["data/epoch"] == pytest.approx(NUM_STEPS * GLOBAL_BATCH / len(NUM_FRAMES))
    assert 0.9 < last["data/epoch_min"] / last["data/epoch_max"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        (2, ["training.micro_batch=5"]),
        (3, ["fsdp2.shard_size=3"]),
        pytest.param(2, ["engine=deepspeed", "deepspeed.zero_stage=2"], marks=needs_deepspeed),
        pytest.param(2, ["engine=deepspeed", "deepspeed.zero_stage=3"], marks=needs_deepspeed),
    ],
    ids=["micro-batches", "three-ranks", "zero-2", "zero-3"],
)
def test_layouts_and_engines_agree(
    alone: Path, clips: Path, tmp_path: Path, num_processes: int, overrides: list[str]
) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    train(recipe, *overrides, num_processes=num_processes)
    assert_same_curve(losses(tmp_path / "runs" / "clips"), losses(alone))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [FORCING, "model.temporal=none", "model.mixer=[pom, attention]"])
def test_every_kind_of_model_trains_alike_on_two_ranks(clips: Path, tmp_path: Path, mask: str) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    alone = train_alone(recipe, mask)
    train(recipe, mask, "name=two", "training.micro_batch=3", num_processes=2)
    assert_same_curve(losses(alone.with_name("two")), losses(alone))


def test_per_group_times_and_offsets_change_the_loss(alone: Path, clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    short = f"training.total_samples={4 * GLOBAL_BATCH}"
    none = "schedule.warmup_samples=0"
    first = losses(train_alone(recipe, "name=a", short, none))
    forced = losses(train_alone(recipe, "name=b", short, none, FORCING))
    at_zero = losses(train_alone(recipe, "name=c", short, none, "diffusion.max_start_group=0"))
    assert first[GLOBAL_BATCH] == forced[GLOBAL_BATCH] == at_zero[GLOBAL_BATCH]  # the head begins at 0
    assert len({curve[4 * GLOBAL_BATCH] for curve in (first, forced, at_zero)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(alone: Path, clips: Path, tmp_path: Path, mode: str) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    folder = train_alone(recipe, f"compute.activation_checkpointing={mode}")
    assert losses(folder) == losses(alone)


@pytest.mark.slow
def test_compiled_blocks_follow_eager_ones(alone: Path, clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    short = f"training.total_samples={20 * GLOBAL_BATCH}"
    compiled = losses(train_alone(recipe, "compute.compile=true", short, FORCING))
    eager = losses(train_alone(recipe, "name=eager", short, FORCING))
    for samples, loss in eager.items():
        assert compiled[samples] == pytest.approx(loss, rel=1e-4)


def test_bf16_follows_fp32(alone: Path, clips: Path, tmp_path: Path) -> None:
    folder = train_alone(write_video_recipe(tmp_path, clips), "compute.precision=bf16")
    for samples, loss in losses(alone).items():
        assert losses(folder)[samples] == pytest.approx(loss, rel=0.05)


def test_validation_and_clips(clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    total = 4 * GLOBAL_BATCH
    folder = train_alone(
        recipe,
        f"training.total_samples={total}",
        "schedule.warmup_samples=0",
        f"validation={{path: {clips}/latents, every_samples: {total}, batch: 4}}",
        f"sampling={{every_samples: {total}, prompts: [a red bar, a blue bar that rises], num_each: 2, num_steps: 3, "
        "guidance: 1.5}",
    )
    (validated,) = (row for row in rows(folder) if "validation/loss" in row)
    assert math.isfinite(validated["validation/loss"])
    assert validated["validation/bad_samples"] == 0
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        f"samples-{total:012d}.mp4",
        f"samples-{total:012d}.png",
    ]


def test_flops_are_those_of_the_clips_that_there_are(clips: Path, tmp_path: Path) -> None:
    recipe = load_train_recipe(write_video_recipe(tmp_path, clips))
    mixture = Mixture.open(recipe.data, seed=0, global_batch=GLOBAL_BATCH, read_text=True)
    model = recipe.model
    of_frames = {
        num_frames: training_flops(
            model.model_copy(update={"latent_shape": (4, max(2, num_frames // 4), 6, 8)}), text_length=24
        )
        for num_frames in set(NUM_FRAMES)
    }
    expected = sum(of_frames[num_frames] for num_frames in NUM_FRAMES) / len(NUM_FRAMES)
    assert mean_flops(recipe, mixture) == pytest.approx(expected)
    assert expected < training_flops(model, text_length=24)
