"""What an error for want of memory advises; tests/e2e/test_out_of_memory.py lets memory run out."""

from __future__ import annotations

import pytest

from pomscale.config.load import load_train_recipe
from pomscale.engine.out_of_memory import remedies
from support.paths import RECIPES

QUICKSTART = RECIPES / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "first", "absent"),
    [
        (["training.micro_batch=1"], "compute.activation_checkpointing=selective|full", "micro_batch"),
        (["training.micro_batch=1", "compute.activation_checkpointing=every-2"], "=full", "selective"),
        (
            ["training.micro_batch=1", "compute.activation_checkpointing=full", "fsdp2.shard_size=2"],
            "fsdp2.shard_size=null",
            "activation",
        ),
        (
            ["training.micro_batch=1", "compute.activation_checkpointing=full", "engine=deepspeed"],
            "deepspeed.zero_stage=3",
            "fsdp2",
        ),
    ],
)
def test_only_what_is_not_done_yet_is_proposed(overrides: list[str], first: str, absent: str) -> None:
    found = remedies(load_train_recipe(QUICKSTART, overrides))
    assert found[0].endswith(first)
    assert absent not in " ".join(found)


def test_every_other_remedy_done_leaves_more_gpus() -> None:
    done = ["training.micro_batch=1", "compute.activation_checkpointing=full", "fsdp2.cpu_offload=true"]
    assert remedies(load_train_recipe(QUICKSTART, [*done, "optimizer.moments=bf16"])) == [
        "more GPUs (pomscale plan tells how many)"
    ]
