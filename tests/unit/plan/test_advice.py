"""Advice of a plan against trying every micro-batch; from the cheap to the dear."""

from __future__ import annotations

import pytest

from pomscale.config.train import TrainRecipe
from pomscale.plan.advice import changed, cheapest_fit, room_for_more
from pomscale.plan.batch import batch_share
from pomscale.plan.memory import step_memory
from support.tiny_plans import TINY_MODEL, tiny


def fits(recipe: TrainRecipe, usable: float) -> bool:
    return step_memory(recipe, 8).peak <= usable


def largest_by_trying(recipe: TrainRecipe, usable: float) -> int:
    sizes = (batch_share(recipe, 8).micro_batch for recipe in _with_micro_batches(recipe) if fits(recipe, usable))
    return max(sizes, default=0)


def _with_micro_batches(recipe: TrainRecipe) -> list[TrainRecipe]:
    slice_ = recipe.training.global_batch // 8
    return [changed(recipe, {"training.micro_batch": size}) for size in range(1, slice_ + 1)]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.9])
def test_the_largest_micro_batch_is_found(mode: str, share: float) -> None:
    recipe = tiny(training={"total_samples": 36000, "global_batch": 36 * 8}, compute={"activation_checkpointing": mode})
    usable = share * step_memory(recipe, 8).peak
    wanted = largest_by_trying(recipe, usable)
    found = cheapest_fit(recipe, 8, usable)
    if wanted >= 36 // 8:
        assert found is not None
        assert found.changes == {"training.micro_batch": wanted}
    if found is not None:
        assert fits(changed(recipe, found.changes), usable)
        assert found.memory == step_memory(changed(recipe, found.changes), 8)


def test_advice_climbs_from_the_cheap_to_the_dear() -> None:
    recipe = tiny(
        fsdp2={"shard_size": 2},
        model={**TINY_MODEL, "dim": 256},
        training={"global_batch": 64 * 8, "total_samples": 51200},
    )
    keys = []
    usable = step_memory(recipe, 8).peak - 1.0
    while (found := cheapest_fit(recipe, 8, usable)) is not None:
        keys.append(tuple(found.changes))
        usable = found.memory.peak * 0.9
    order = [key for i, key in enumerate(keys) if key not in keys[:i]]
    assert order[0] == ("training.micro_batch",)
    assert ("compute.activation_checkpointing", "training.micro_batch") in order
    assert order[-1][:3] == ("fsdp2.shard_size", "optimizer.moments", "fsdp2.cpu_offload")


def test_room_is_used_for_less_recomputation_then_for_larger_micro_batches() -> None:
    recipe = tiny(compute={"activation_checkpointing": "full"}, training={"micro_batch": 2})
    found = room_for_more(recipe, 8, 1e12)
    assert found is not None
    assert str(found) == "compute.activation_checkpointing=none"
    found = room_for_more(changed(recipe, found.changes), 8, 1e12)
    assert found is not None
    assert str(found) == "training.micro_batch=6"
    assert room_for_more(tiny(), 8, 1e12) is None
