"""Changes of a recipe: the cheapest one that fits into memory, or one that uses memory that is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pomscale.config.train import TrainRecipe
from pomscale.plan.batch import batch_share, largest_slice, with_micro_batch
from pomscale.plan.memory import StepMemory, step_memory

Changes = dict[str, Any]

# Ways to keep fewer activations, the cheapest first.
_CHECKPOINTING = ("none", "selective", "every-2", "full")
# A micro-batch below 1/8 of the recipe's leaves a GPU idle, so other changes are cheaper.
_SMALLEST_SHARE = 8


@dataclass(frozen=True)
class Advice:
    """Recipe keys with their new values, and the memory of a step with them."""

    changes: Changes
    memory: StepMemory
    micro_batch: int | None = None
    """Samples of a micro-batch, where they change."""

    def __str__(self) -> str:
        return " ".join(f"{key}={_as_override(value)}" for key, value in self.changes.items())


def changed(recipe: TrainRecipe, changes: Mapping[str, Any]) -> TrainRecipe:
    """Return the recipe with `changes`: keys section.field -> values, which must be valid."""
    for key, value in changes.items():
        section, field = key.split(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={field: value})})
    return recipe


def cheapest_fit(recipe: TrainRecipe, num_gpus: int, usable: float) -> Advice | None:
    """Return the cheapest change by which a recipe fits into `usable` bytes per GPU; None if none does.

    Changes are tried in this order: smaller micro-batches; stronger checkpointing, each with the largest micro-batch
    that fits; then the same with more sharding, bf16 moments and offloading, each on top of the ones before.
    """
    asked = batch_share(recipe, num_gpus).micro_batch
    modes = _modes(recipe.compute.activation_checkpointing)
    sharding: Changes = {}
    for step in ({}, *_sharding(recipe, num_gpus)):
        sharding |= step
        strongest = sharding | {"compute.activation_checkpointing": modes[-1]}
        if _largest(recipe, num_gpus, usable, strongest, at_most=1) is None:
            continue
        for mode in modes:
            changes = sharding | {"compute.activation_checkpointing": mode}
            smallest = 1 if mode == modes[-1] else max(asked // _SMALLEST_SHARE, 1)
            found = _largest(recipe, num_gpus, usable, changes, at_most=asked)
            if found is not None and (found.micro_batch or 0) >= smallest:
                return _only_what_differs(recipe, found)
    return None


def room_for_more(recipe: TrainRecipe, num_gpus: int, usable: float) -> Advice | None:
    """Return a faster setting for a recipe that fits: less recomputation, else the largest micro-batch that fits.

    Recomputation is reduced at the same micro-batch. None if there is no better setting.
    """
    now = batch_share(recipe, num_gpus)
    for mode in _CHECKPOINTING:
        if mode == recipe.compute.activation_checkpointing or mode not in _milder(recipe):
            break
        changes = {"compute.activation_checkpointing": mode}
        memory = step_memory(changed(recipe, changes), num_gpus)
        if memory.peak <= usable:
            return Advice(changes, memory)
    if now.num_micro_batches == 1:
        return None
    largest = _largest(recipe, num_gpus, usable, {}, at_most=largest_slice(recipe, num_gpus))
    if largest is None or (largest.micro_batch or 0) <= now.micro_batch:
        return None
    return largest


def _largest(recipe: TrainRecipe, num_gpus: int, usable: float, changes: Changes, *, at_most: int) -> Advice | None:
    """Return `changes` with the largest micro-batch that fits, at most `at_most`; None if none fits.

    A rank's samples are cut into even pieces, so there is one size for each number of micro-batches. The peak is nearly
    linear in the size: from one that is too large, the search estimates the next to try, and then goes back to larger
    ones, up to one that is known to be too large.
    """
    most = largest_slice(recipe, num_gpus)
    number = fewest = -(-most // at_most)
    found = None
    while True:
        size = -(-most // number)
        of_size = changes | with_micro_batch(recipe, size)
        candidate = changed(recipe, of_size)
        memory = step_memory(candidate, num_gpus)
        if memory.peak <= usable:
            found = Advice(of_size, memory, size)
            if number == fewest:
                return found
            number -= 1
        elif found is not None or number == most:
            return found
        else:
            fewest = number + 1
            over = (memory.peak - usable) / memory.by_part["activations"]
            number = min(max(math.ceil(number / (1 - over)), fewest), most) if over < 1 else most


def _modes(current: str) -> list[str]:
    """Return the current mode of checkpointing and all that keep less."""
    if current in _CHECKPOINTING:
        return list(_CHECKPOINTING[_CHECKPOINTING.index(current) :])
    return [current, "every-2", "full"]  # every-N, N > 2


def _milder(recipe: TrainRecipe) -> tuple[str, ...]:
    """Return the modes of checkpointing that recompute less than the recipe's."""
    current = recipe.compute.activation_checkpointing
    return _CHECKPOINTING[: _CHECKPOINTING.index(current)] if current in _CHECKPOINTING else ("none", "selective")


def _sharding(recipe: TrainRecipe, num_gpus: int) -> Iterator[Changes]:
    """Yield changes of sharding, optimiser and offloading, the cheapest first."""
    deepspeed, fsdp2 = recipe.deepspeed, recipe.fsdp2
    if recipe.engine == "deepspeed":
        for stage in range(deepspeed.zero_stage + 1, 4):
            yield {"deepspeed.zero_stage": stage}
    else:
        if not fsdp2.reshard_after_forward:
            yield {"fsdp2.reshard_after_forward": True}
        if fsdp2.shard_size not in (None, num_gpus):
            yield {"fsdp2.shard_size": None}
    if recipe.optimizer.moments == "fp32":
        yield {"optimizer.moments": "bf16"}
    if recipe.engine == "deepspeed" and not deepspeed.offload_optimizer:
        yield {"deepspeed.offload_optimizer": True}
    if recipe.engine == "fsdp2" and not fsdp2.cpu_offload:
        yield {"fsdp2.cpu_offload": True}


def _only_what_differs(recipe: TrainRecipe, advice: Advice) -> Advice:
    def current(key: str) -> Any:
        section, field = key.split(".")
        return getattr(getattr(recipe, section), field)

    return Advice({key: value for key, value in advice.changes.items() if value != current(key)}, advice.memory)


def _as_override(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
