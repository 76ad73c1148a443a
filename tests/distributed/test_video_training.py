"""Training on clips of several lengths and pictures, with texts: the same losses by any engine, on any layout."""

from __future__ import annotations

import importlib.util
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError
from pomscale.config.load import load_encode_recipe, load_train_recipe
from pomscale.data.mixture import Mixture
from pomscale.evaluation.heldout import measure_heldout
from pomscale.plan.model_cost import training_flops
from pomscale.shards.schema import read_manifest
from pomscale.training.build import mean_flops, open_inputs
from pomscale.training.run import train as train_here
from support.running import GLOBAL_BATCH, NUM_STEPS, assert_same_curve, losses, rows, train
from support.tiny_models import save_t5
from support.video_run import NUM_FRAMES, make_clips, write_video_recipe

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FORCING = "diffusion.time.per_frame_group=true"
FEW = 20  # steps of runs of several ranks
FEWER = f"training.total_samples={FEW * GLOBAL_BATCH}"


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
        (2, ["training.micro_batch=5", "mesh.sp=2"]),
        pytest.param(3, ["fsdp2.shard_size=3"], marks=pytest.mark.exhaustive),
        pytest.param(
            2, ["engine=deepspeed", "deepspeed.zero_stage=2"], marks=[needs_deepspeed, pytest.mark.exhaustive]
        ),
        pytest.param(
            2, ["engine=deepspeed", "deepspeed.zero_stage=3"], marks=[needs_deepspeed, pytest.mark.exhaustive]
        ),
    ],
    ids=["micro-batches", "split tokens", "three-ranks", "zero-2", "zero-3"],
)
def test_layouts_and_engines_agree(
    alone: Path, clips: Path, tmp_path: Path, num_processes: int, overrides: list[str]
) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    train(recipe, *overrides, FEWER, num_processes=num_processes)
    assert_same_curve(losses(tmp_path / "runs" / "clips"), losses(alone), FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [
        FORCING,
        pytest.param("model.temporal=none", marks=pytest.mark.exhaustive),
        pytest.param("model.mixer=[pom, attention]", marks=pytest.mark.exhaustive),
    ],
)
def test_every_kind_of_model_trains_alike_on_two_ranks(clips: Path, tmp_path: Path, mask: str) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    # Batches of one shape each: at times the two ranks have different ones, and at the end one has none.
    validation = f"validation={{path: {clips}/latents, every_samples: {10 * GLOBAL_BATCH}, num_samples: 45, batch: 8}}"
    alone = train_alone(recipe, mask, validation, FEWER)
    train(recipe, mask, validation, FEWER, "name=two", "training.micro_batch=3", num_processes=2)
    two = alone.with_name("two")
    assert_same_curve(losses(two), losses(alone), FEW)
    measured = [[row["validation/loss"] for row in rows(run) if "validation/loss" in row] for run in (alone, two)]
    assert len(measured[0]) == FEW // 10
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)


def test_per_group_times_and_offsets_change_the_loss(alone: Path, clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    short = f"training.total_samples={4 * GLOBAL_BATCH}"
    none = "schedule.warmup_samples=0"
    first = losses(train_alone(recipe, "name=a", short, none))
    forced = losses(train_alone(recipe, "name=b", short, none, FORCING))
    at_zero = losses(train_alone(recipe, "name=c", short, none, "diffusion.max_start_group=0"))
    assert first[GLOBAL_BATCH] == forced[GLOBAL_BATCH] == at_zero[GLOBAL_BATCH]  # the head begins at 0
    assert len({curve[4 * GLOBAL_BATCH] for curve in (first, forced, at_zero)}) == 3


def test_samples_with_fewer_tokens_than_ranks_are_refused(clips: Path, tmp_path: Path) -> None:
    recipe = load_train_recipe(write_video_recipe(tmp_path, clips), ["mesh.sp=13"])  # clips of two groups have 24
    with pytest.raises(InputError, match=r"mesh\.sp: 13 ranks cannot share the 12 tokens of samples of shape 4x"):
        open_inputs(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.exhaustive), "selective"])
def test_activation_checkpointing_changes_no_bit(alone: Path, clips: Path, tmp_path: Path, mode: str) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    folder = train_alone(recipe, f"compute.activation_checkpointing={mode}")
    assert losses(folder) == losses(alone)


@pytest.mark.exhaustive
def test_compiled_blocks_follow_eager_ones(clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    total = f"training.total_samples={6 * GLOBAL_BATCH}"
    compiled = losses(train_alone(recipe, "compute.compile=true", total, FORCING))
    eager = losses(train_alone(recipe, "name=eager", total, FORCING))
    for samples, loss in eager.items():
        assert compiled[samples] == pytest.approx(loss, rel=1e-4)


@pytest.mark.exhaustive
def test_all_variants_of_a_block_are_compiled(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mixers in one kind of block, three shapes, two batch sizes, and no gradients in validation: more variants
    than torch compiles of one function, unless it is told to, before it runs the rest uncompiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    recipe = write_video_recipe(tmp_path, clips)
    total = 10 * GLOBAL_BATCH
    run = [
        f"training={{total_samples: {total}, global_batch: {GLOBAL_BATCH}, micro_batch: 7}}",
        f"validation={{path: {clips}/latents, every_samples: {total // 2}, batch: 4}}",
        "model.mixer=[pom, attention]",
        FORCING,
    ]
    compiled = losses(train_alone(recipe, "compute.compile=true", *run))
    eager = losses(train_alone(recipe, "name=eager", *run))
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


def test_a_held_out_set_may_have_texts_of_its_own(clips: Path, tmp_path: Path) -> None:
    """The companion set of the recipe belongs to the dataset of the recipe."""
    shutil.copytree(clips / "latents", tmp_path / "texts")
    total = 4 * GLOBAL_BATCH
    folder = train_alone(
        write_video_recipe(tmp_path, clips),
        f"training.total_samples={total}",
        "schedule.warmup_samples=0",
        f"validation={{path: {clips}/latents, text: {tmp_path}/texts, every_samples: {total}, batch: 4}}",
    )
    (logged,) = (row["validation/loss"] for row in rows(folder) if "validation/loss" in row)
    measure = partial(measure_heldout, folder, num_samples=None, num_time_bins=None, weights="ema", device="cpu")
    data, text = str(clips / "latents"), str(tmp_path / "texts")
    assert measure(data=None, text=None)[0].mean == pytest.approx(logged, rel=1e-6)
    assert measure(data=data, text=text)[0].mean == pytest.approx(logged, rel=1e-6)
    shutil.rmtree(tmp_path / "texts")
    assert measure(data=data, text=None)[0].mean == pytest.approx(logged, rel=1e-6)
    for named in ({"data": None, "text": None}, {"data": data, "text": text}):
        with pytest.raises(InputError, match=r"texts: there is no such folder"):
            measure(**named)


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


def test_fine_tuning_needs_the_same_text_encoder(alone: Path, clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    total = f"training.total_samples={2 * GLOBAL_BATCH}"
    tuned = train_alone(recipe, f"init_from={{path: {alone}}}", total, "schedule.warmup_samples=0", "name=tuned")
    assert losses(tuned)[GLOBAL_BATCH] < losses(alone)[GLOBAL_BATCH]  # it does not begin as the identity

    # The same captions through another encoder, as a companion set.
    other = save_t5(tmp_path / "t5", 1)
    text = tmp_path / "text.yaml"
    text.write_text(
        f"""
kind: encode
name: text
output: {tmp_path}/text
source: {{kind: latents, path: {clips}/latents}}
text: {{path: {other}, tokenizer: bytes, max_length: 24, precision: fp32}}
"""
    )
    encode(load_encode_recipe(text), progress=False)
    with pytest.raises(InputError, match="was trained on texts of another text encoder"):
        train_alone(recipe, f"init_from={{path: {alone}}}", f"data.text={tmp_path}/text", "name=other")
    retold = losses(
        train_alone(recipe, f"data.text={tmp_path}/text", total, "schedule.warmup_samples=0", "name=retold")
    )
    assert retold[GLOBAL_BATCH] == losses(alone)[GLOBAL_BATCH]  # the head begins at 0
    assert retold[2 * GLOBAL_BATCH] != losses(alone)[2 * GLOBAL_BATCH]


def test_the_text_encoder_may_lie_elsewhere_than_where_captions_were_encoded(clips: Path, tmp_path: Path) -> None:
    recipe = write_video_recipe(tmp_path, clips)
    short = [f"training.total_samples={GLOBAL_BATCH}", "schedule.warmup_samples=0"]
    sampling = "every_samples: 32, prompts: [a red bar], num_steps: 1"
    with pytest.raises(InputError, match=r"sampling\.text_path in a recipe"):
        train_alone(recipe, *short, f"sampling={{{sampling}, text_path: {tmp_path}/nowhere}}", "name=a")
    shutil.copytree(clips / "t5", tmp_path / "moved")
    train_alone(recipe, *short, f"sampling={{{sampling}, text_path: {tmp_path}/moved}}", "name=b")
