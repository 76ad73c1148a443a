"""Packed runs on clips of three lengths, pictures and texts: alike on any layout, and exact after a kill."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

from pomscale.checkpoint.store import find_checkpoint, read_meta
from support.running import (
    GLOBAL_BATCH,
    assert_same_curve,
    assert_same_run,
    checkpoint_samples,
    losses,
    rows,
    run,
    start_and_signal,
    train,
    train_command,
)
from support.video_run import make_clips, write_video_recipe

TOTAL = 30 * GLOBAL_BATCH - 5  # within a step
BUDGET = 500  # tokens; samples have 24 or 12
PACKED = [
    "name=tiny",
    f"training={{total_samples: {TOTAL}, global_tokens: {BUDGET}}}",
    "monitoring.every_samples=1",
    "diffusion.time.shift_base_tokens=12",
]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def recipe(clips: Path, tmp_path: Path) -> Path:
    return write_video_recipe(tmp_path, clips)


@pytest.fixture(scope="module")
def alone(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_video_recipe(folder, clips), *PACKED)
    return folder / "runs" / "tiny"


def assert_same_packed_curve(ours: dict[int, float], reference: dict[int, float]) -> None:
    assert list(ours) == list(reference), "steps end elsewhere"
    for number, (samples, loss) in enumerate(ours.items()):
        assert loss == pytest.approx(reference[samples], rel=1e-5 if number < 10 else 1e-3), f"step {number}"


def test_steps_differ_and_the_last_one_is_cut(alone: Path) -> None:
    ends = list(losses(alone))
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == checkpoint_samples(alone) == TOTAL
    assert len(set(sizes)) > 2
    assert all(BUDGET // 24 <= size <= BUDGET // 12 for size in sizes[:-1])
    curve = list(losses(alone).values())
    assert sum(curve[-8:]) < sum(curve[:8])
    assert read_meta(find_checkpoint(alone))["last_step"] == sizes[-1]
    rates = [row["train/learning_rate"] for row in rows(alone) if "train/loss" in row]
    middles = [end - size // 2 for end, size in zip(ends, sizes, strict=True)]
    warm_up = 5 * GLOBAL_BATCH
    assert rates == pytest.approx([1e-3 * min(1.0, middle / warm_up) for middle in middles])


def test_two_ranks_train_as_one(alone: Path, recipe: Path) -> None:
    train(recipe, *PACKED, "training.micro_tokens=96", num_processes=2)
    assert_same_packed_curve(losses(recipe.parent / "runs" / "tiny"), losses(alone))


@needs_deepspeed
@pytest.mark.slow
def test_zero_2_trains_as_fsdp2(alone: Path, recipe: Path) -> None:
    train(recipe, *PACKED, "engine=deepspeed", "deepspeed.zero_stage=2", num_processes=2)
    assert_same_packed_curve(losses(recipe.parent / "runs" / "tiny"), losses(alone))


def test_kill_and_resume_is_exact(alone: Path, recipe: Path) -> None:
    folder = recipe.parent / "runs" / "tiny"
    start_and_signal(recipe, *PACKED, after_samples=14 * GLOBAL_BATCH, number=signal.SIGKILL)
    assert checkpoint_samples(folder) < TOTAL
    assert "resuming from" in train(recipe, *PACKED).stdout
    assert_same_run(folder, alone)
    refused = run(train_command(recipe, *PACKED, "training.global_tokens=400"), expect=2)
    assert "training.global_tokens: 500 then, 400 now" in refused.stderr


def test_budgets_that_hold_no_sample_are_refused(recipe: Path) -> None:
    refused = run(train_command(recipe, *PACKED, "training.global_tokens=23"), expect=2)
    assert "training.global_tokens: 23 tokens cannot hold a sample of shape 4x4x6x8, which has 24" in refused.stderr
    refused = run(train_command(recipe, *PACKED, "training.global_tokens=40", num_processes=2), expect=None)
    assert "use at least 48 tokens, or at most 1 ranks" in refused.stderr


def test_with_one_shape_a_packed_run_is_the_run_of_a_global_batch(tiny_recipe: Path) -> None:
    """Pictures of a class, of 16 tokens each: the same samples in the same steps."""
    mixers = "model.mixer=[attention, {kind: pom, form: coefficients, heads: 8, rope: true}]"
    choices = [mixers, "model.in_context={tokens: 2, start: 1}", "model.dropout={rate: 0.1}"]
    runs, budget = tiny_recipe.parent / "runs", f"global_tokens: {16 * GLOBAL_BATCH}"
    train(tiny_recipe, *choices, "name=batches")
    train(tiny_recipe, *choices, f"training={{total_samples: {30 * GLOBAL_BATCH}, {budget}, micro_tokens: 100}}")
    assert_same_curve(losses(runs / "tiny"), losses(runs / "batches"))
