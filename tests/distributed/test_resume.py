"""A run that was killed, stopped or moved to other ranks ends as one that was left alone."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from support.running import (
    GLOBAL_BATCH,
    NUM_STEPS,
    assert_same_curve,
    assert_same_run,
    checkpoint_samples,
    losses,
    outcome,
    rows,
    start_and_signal,
    train,
    write_tiny_recipe,
)

TOTAL = NUM_STEPS * GLOBAL_BATCH


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_tiny_recipe(folder, digits), num_processes=2)
    return folder / "runs" / "tiny"


def test_kill_and_resume_is_exact(undisturbed: Path, tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    start_and_signal(tiny_recipe, after_samples=14 * GLOBAL_BATCH, number=signal.SIGKILL, num_processes=2)
    assert checkpoint_samples(folder) < TOTAL
    resumed = train(tiny_recipe, num_processes=2)
    assert "resuming from" in resumed.stdout
    assert_same_run(folder, undisturbed)
    assert outcome(folder)["state"] == "finished"


@pytest.mark.slow
def test_kill_and_resume_is_exact_with_muon_and_dropout(tiny_recipe: Path) -> None:
    """Momenta in bf16, whose rounding is drawn step by step, and the masks of dropout, are those of the step."""
    choices = [
        "optimizer={name: muon, lr: 3e-3, moments: bf16}",
        "model.dropout={rate: 0.1, last: 0}",
        "model.ffn=swiglu",
        "model.norm=rms",
        "model.in_context={tokens: 2, start: 1}",
        "diffusion.objective=x",
    ]
    runs = tiny_recipe.parent / "runs"
    train(tiny_recipe, *choices, "name=whole", num_processes=2)
    start_and_signal(tiny_recipe, *choices, after_samples=20 * GLOBAL_BATCH, number=signal.SIGKILL, num_processes=2)
    assert checkpoint_samples(runs / "tiny") < TOTAL
    assert "resuming from" in train(tiny_recipe, *choices, num_processes=2).stdout
    assert_same_run(runs / "tiny", runs / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.exhaustive)])
def test_many_kills_at_random_moments_while_saving_at_every_step(
    undisturbed: Path, tiny_recipe: Path, asynchronous: str
) -> None:
    """With a save at every step, most kills fall into one."""
    folder = tiny_recipe.parent / "runs" / "tiny"
    overrides = [f"checkpoint.every_samples={GLOBAL_BATCH}", f"checkpoint.asynchronous={asynchronous}"]
    moments = sorted(random.Random(0).sample(range(2, NUM_STEPS - 14), 4))
    for step in moments:
        start_and_signal(
            tiny_recipe, *overrides, after_samples=step * GLOBAL_BATCH, number=signal.SIGKILL, num_processes=2
        )
    train(tiny_recipe, *overrides, num_processes=2)
    assert_same_run(folder, undisturbed)
    assert {row["incarnation"] for row in rows(folder)} == set(range(1, len(moments) + 2))


@pytest.mark.slow
def test_moving_between_numbers_of_ranks(undisturbed: Path, tiny_recipe: Path) -> None:
    """2 -> 3 -> 1 processes in the middle of an epoch, with other micro-batches and reader threads each time.

    The two share the tokens of their samples, and the three do not.
    """
    folder = tiny_recipe.parent / "runs" / "tiny"
    legs = [
        (2, 10, ["training.micro_batch=2", "data.num_threads=1", "mesh.sp=2"]),
        (3, 18, ["training.micro_batch=3", "data.num_threads=3"]),
    ]
    stopped_at = []
    for num_processes, step, overrides in legs:
        start_and_signal(
            tiny_recipe,
            *overrides,
            after_samples=step * GLOBAL_BATCH,
            number=signal.SIGTERM,
            num_processes=num_processes,
        )
        # The stop saved: it did not merely fall back to the last regular checkpoint.
        assert outcome(folder)["state"] == "stopped"
        assert outcome(folder)["samples"] == checkpoint_samples(folder) >= step * GLOBAL_BATCH
        stopped_at.append(outcome(folder)["samples"])
    train(tiny_recipe)
    assert outcome(folder)["incarnation"] == len(legs) + 1
    assert stopped_at == sorted(set(stopped_at))
    assert_same_curve(losses(folder), losses(undisturbed))


def test_a_stop_request_saves_and_exits_with_75(digits: Path, tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    validation = (
        "validation={path: " + str(digits) + f"/latents/heldout, every_samples: {GLOBAL_BATCH}, "
        "num_samples: 8, batch: 8, num_time_bins: 2}"
    )
    code = start_and_signal(tiny_recipe, validation, after_samples=12 * GLOBAL_BATCH, number=signal.SIGTERM)
    assert code == 75
    assert outcome(folder)["state"] == "stopped"
    # Nothing is lost: the checkpoint is at the last step done, not at the last multiple of every_samples.
    assert outcome(folder)["samples"] == checkpoint_samples(folder) == max(losses(folder)) >= 12 * GLOBAL_BATCH
    train(tiny_recipe, validation)
    every_step = [GLOBAL_BATCH * step for step in range(1, NUM_STEPS + 1)]
    assert list(losses(folder)) == every_step
    # The validation that was due at the stop happened after the restart.
    assert sorted({row["samples"] for row in rows(folder) if "validation/loss" in row}) == every_step


def test_a_finished_run_is_left_as_it_is(tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    short = [f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}"]
    train(tiny_recipe, *short)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "finished already" in train(tiny_recipe, *short).stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
