"""The same run by every engine and in every mode: its losses, held against those of one process by FSDP2, eager, fp32.

FSDP2 on other numbers of ranks, and accumulation: test_layouts.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pomscale.config.load import load_train_recipe
from pomscale.training.run import train as train_here
from support.running import (
    GLOBAL_BATCH,
    NUM_STEPS,
    assert_same_curve,
    assert_same_run,
    checkpoint_samples,
    losses,
    outcome,
    rows,
    run,
    train,
    write_tiny_recipe,
)

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FAULTY_TRAIN = Path(__file__).with_name("faulty_train.py")


def train_alone(recipe: Path, *overrides: str) -> Path:
    """In this process; returns the run folder."""
    loaded = load_train_recipe(recipe, [*overrides, "faults.preflight=false", "faults.hang_timeout_s=null"])
    assert train_here(loaded) == 0
    return Path(loaded.output) / loaded.name


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that all others are held against."""
    return train_alone(write_tiny_recipe(tmp_path_factory.mktemp("alone"), digits))


# Fused kernels round every intermediate, other layouts only the last sums. Adam divides what is left of a gradient that
# is zero but for rounding by itself, so at the tiny recipe's high rate of 3e-3 the curves part by 7e-3 within 50 steps.
CALM = "optimizer.lr=3e-4"


@pytest.fixture(scope="module")
def calm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at a learning rate that does not magnify rounding."""
    return train_alone(write_tiny_recipe(tmp_path_factory.mktemp("calm"), digits), CALM)


@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        pytest.param(
            4,
            # The copies are compared on the way: they must be the same to the bit.
            ["fsdp2.shard_size=2", f"faults.consistency_every_samples={10 * GLOBAL_BATCH}"],
            id="HSDP 2x2",
            marks=pytest.mark.exhaustive,  # test_engine.py has it too
        ),
        # Two copies, each of two ranks that share the tokens of its samples.
        pytest.param(4, ["mesh.sp=2", "fsdp2.shard_size=2"], id="HSDP 2x2, sp 2"),
        *(
            pytest.param(
                2,
                ["engine=deepspeed", f"deepspeed.zero_stage={stage}"],
                id=f"ZeRO-{stage} x2",
                marks=[needs_deepspeed, how_often],
            )
            for stage, how_often in ((1, pytest.mark.exhaustive), (2, pytest.mark.exhaustive), (3, pytest.mark.slow))
        ),
    ],
)
def test_engines_agree_in_fp32(alone: Path, tiny_recipe: Path, num_processes: int, overrides: list[str]) -> None:
    train(tiny_recipe, *overrides, num_processes=num_processes)
    folder = tiny_recipe.parent / "runs" / "tiny"
    report_difference(folder, alone)
    assert_same_curve(losses(folder), losses(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["fsdp2", pytest.param("deepspeed", marks=[needs_deepspeed, pytest.mark.exhaustive])]
)
def test_bf16_follows_fp32(alone: Path, tiny_recipe: Path, engine: str) -> None:
    train(tiny_recipe, f"engine={engine}", "compute.precision=bf16", num_processes=2)
    folder = tiny_recipe.parent / "runs" / "tiny"
    report_difference(folder, alone)
    for ours, reference in zip(losses(folder).values(), losses(alone).values(), strict=True):
        assert ours == pytest.approx(reference, rel=2e-2)


@pytest.mark.parametrize("mode", ["full", "every-2", "selective"])
def test_activation_checkpointing_changes_no_bit(alone: Path, tiny_recipe: Path, mode: str) -> None:
    folder = train_alone(tiny_recipe, f"compute.activation_checkpointing={mode}")
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_compiled_blocks_follow_eager_ones(calm: Path, tiny_recipe: Path) -> None:
    """Whoever is asked to stop while it compiles, its compilers too, ends the first step, and saves it."""
    folder, overrides = tiny_recipe.parent / "runs" / "tiny", ["compute.compile=true", CALM]
    stop = {"do": "send", "number": "SIGUSR1", "at": "step", "nth": 1, "after_s": 1.0, "to_group": True}
    train_and_stop(stop, tiny_recipe, *overrides, num_processes=2)
    assert outcome(folder)["state"] == "stopped"
    assert checkpoint_samples(folder) == GLOBAL_BATCH
    train(tiny_recipe, *overrides, num_processes=2)
    report_difference(folder, calm)
    assert_same_curve(losses(folder), losses(calm))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["none", "every-2", "selective"])
def test_compiled_blocks_of_every_mode_follow_eager_ones(calm: Path, tiny_recipe: Path, mode: str) -> None:
    train(tiny_recipe, "compute.compile=true", f"compute.activation_checkpointing={mode}", CALM)
    folder = tiny_recipe.parent / "runs" / "tiny"
    report_difference(folder, calm)
    assert_same_curve(losses(folder), losses(calm))


def train_and_stop(stop: dict[str, Any], recipe: Path, *overrides: str, num_processes: int) -> None:
    """Train by torchrun, which ends with an exit code of its own, until the ranks stop; see faulty_train.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    run([sys.executable, *launcher, str(FAULTY_TRAIN), json.dumps([stop]), str(recipe), *overrides], expect=1)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_moves_between_engines(alone: Path, tiny_recipe: Path) -> None:
    """Each part continues from the checkpoint of the part before it, which another engine has written."""
    folder = tiny_recipe.parent / "runs" / "tiny"
    zero_2, zero_3 = (["engine=deepspeed", f"deepspeed.zero_stage={stage}"] for stage in (2, 3))
    stopped_at = 0
    for num_processes, num_steps, overrides in ((2, 8, []), (2, 7, zero_2), (1, 8, zero_3)):
        stop = {"do": "send", "number": "SIGTERM", "at": "step", "nth": num_steps}
        train_and_stop(stop, tiny_recipe, *overrides, num_processes=num_processes)
        stopped_at += num_steps * GLOBAL_BATCH
        assert outcome(folder)["state"] == "stopped"
        assert checkpoint_samples(folder) == stopped_at
    train(tiny_recipe)
    report_difference(folder, alone)
    assert {row["incarnation"] for row in rows(folder)} == {1, 2, 3, 4}
    assert_same_curve(losses(folder), losses(alone))


def report_difference(folder: Path, reference: Path) -> None:
    """Shown with `pytest -rA`: the figures of the table in docs/results.md."""
    pairs = list(zip(losses(folder).values(), losses(reference).values(), strict=True))
    differences = [abs(ours / theirs - 1) for ours, theirs in pairs]
    assert len(differences) == NUM_STEPS
    early, late = max(differences[:10]), max(differences)
    print(f"relative difference of the loss: {early:.1e} to step 10, {late:.1e} to step {NUM_STEPS}")
