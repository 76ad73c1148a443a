"""A trunk of other choices, dropout and Muon among them, trains alike on any layout and engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import GLOBAL_BATCH, assert_same_curve, losses, train, write_tiny_recipe

# In the daily suite test_muon_ranks.py holds such a network against a plain loop.
pytestmark = pytest.mark.exhaustive

NUM_STEPS = 8
JIT = [
    "model.norm=rms",
    "model.ffn=swiglu",
    "model.gates=g",
    "model.positions=sincos_integer",
    "model.time_embedding=data_fraction",
    "model.patch_embedding={bottleneck: 8}",
    "model.in_context={tokens: 3, start: 1}",
    "model.dropout={rate: 0.2, first: 1}",
    "model.mixer=[{kind: attention, heads: 4, qk_norm: true, rope: true}, "
    "{kind: pom, form: coefficients, degree: 3, heads: 4, rope: true}]",
    "diffusion.objective=x",
    "optimizer.name=muon",
    f"training.total_samples={NUM_STEPS * GLOBAL_BATCH}",
    "schedule={warmup_samples: 96, cooldown_samples: 96}",
]


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_tiny_recipe(folder, digits), *JIT)
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        pytest.param(2, ["compute.activation_checkpointing=full"], id="FSDP2, recomputed"),
        pytest.param(2, ["engine=deepspeed", "deepspeed.zero_stage=3"], id="ZeRO 3"),
        pytest.param(2, ["fsdp2.shard_size=1"], id="HSDP"),
        *(pytest.param(2, ["engine=deepspeed", f"deepspeed.zero_stage={n}"], id=f"ZeRO {n}") for n in (1, 2)),
    ],
)
def test_the_loss_curve_is_that_of_one_process(
    alone: Path, tiny_recipe: Path, num_processes: int, overrides: list[str]
) -> None:
    train(tiny_recipe, *JIT, *overrides, num_processes=num_processes)
    assert_same_curve(losses(tiny_recipe.parent / "runs" / "tiny"), losses(alone), NUM_STEPS)


def test_momenta_in_bf16_agree_too(tiny_recipe: Path) -> None:
    changes = [*JIT, "optimizer.moments=bf16"]
    train(tiny_recipe, *changes, "name=one")
    train(tiny_recipe, *changes, "name=two", "fsdp2.shard_size=1", num_processes=2)
    runs = tiny_recipe.parent / "runs"
    assert_same_curve(losses(runs / "two"), losses(runs / "one"), NUM_STEPS)
