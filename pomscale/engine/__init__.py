"""Engines, which shard, step and save a model; they know of no model in particular."""

from __future__ import annotations

from torch import nn

from pomscale.base.imports import large_imports
from pomscale.config.train import TrainRecipe
from pomscale.distributed.world import World
from pomscale.engine.protocol import Engine, InitWeights


def build_engine(recipe: TrainRecipe, model: nn.Module, init_weights: InitWeights, world: World) -> Engine:
    """Return the engine of the recipe. `model` is on the meta device; see the engines for their errors.

    Raises InputError if a package that the recipe needs is not installed.
    """
    compute, optimizer, averages = recipe.compute, recipe.optimizer, recipe.ema.averages
    _set_mixer_memory(model, compute.mixer_memory)
    if compute.float8:
        from pomscale.engine.float8 import to_float8  # torchao is optional

        to_float8(model, world.device)
    if recipe.engine == "deepspeed":
        with large_imports():
            from pomscale.engine.deepspeed import DeepSpeedEngine  # deepspeed is optional

        return DeepSpeedEngine(
            model,
            init_weights,
            world,
            deepspeed=recipe.deepspeed,
            compute=compute,
            optimizer=optimizer,
            averages=averages,
        )
    from pomscale.engine.fsdp2 import Fsdp2Engine

    return Fsdp2Engine(
        model, init_weights, world, fsdp2=recipe.fsdp2, compute=compute, optimizer=optimizer, averages=averages
    )


def _set_mixer_memory(model: nn.Module, memory: str) -> None:
    """Tell the mixers that have a choice what to keep for the backward pass."""
    for module in model.modules():
        if hasattr(module, "mixer_memory"):
            module.mixer_memory = memory  # type: ignore[assignment]  # any attribute of a module is one of two types
