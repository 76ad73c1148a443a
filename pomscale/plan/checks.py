"""Checks that recipe and machine fit together, apart from memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pomscale.base.errors import InputError
from pomscale.config.hardware import Gpu
from pomscale.config.model import of_shape
from pomscale.config.train import TrainRecipe


def check_layout(recipe: TrainRecipe, num_ranks: int) -> None:
    """Raise InputError, which names the key, unless `num_ranks` ranks can share the recipe's batch and state."""
    batch, shard_size, sp = recipe.samples_per_step, recipe.fsdp2.shard_size, recipe.mesh.sp
    if num_ranks % sp:
        raise InputError(
            f"mesh.sp: {num_ranks} ranks do not make whole groups of {sp}; use a multiple of {sp} ranks, or another sp"
        )
    if batch < num_ranks // sp:
        groups = "ranks" if sp == 1 else f"groups of {sp} ranks"
        if recipe.training.global_tokens is not None:
            raise InputError(
                f"training.global_tokens: {recipe.training.global_tokens} tokens are {batch} samples of "
                f"model.latent_shape, which {num_ranks} ranks cannot share; use at least "
                f"{num_ranks * recipe.model.num_tokens} tokens, or at most {batch} ranks"
            )
        raise InputError(
            f"training.global_batch: {batch} samples cannot be shared by {num_ranks // sp} {groups}; "
            f"use at most {batch} {groups} or a larger global batch"
        )
    if recipe.engine == "fsdp2" and shard_size is not None and num_ranks % shard_size:
        raise InputError(
            f"fsdp2.shard_size: {num_ranks} ranks do not make whole copies of {shard_size}; "
            f"use a multiple of {shard_size} ranks, or another shard_size"
        )


def check_packing(recipe: TrainRecipe, shapes: Iterable[Sequence[int]], num_ranks: int = 1) -> None:
    """Raise InputError, which names the key, unless packed steps hold samples of these latent shapes.

    A micro-batch must hold each of them, and a step one for each of `num_ranks` ranks, which would have none else.
    """
    training = recipe.training
    if training.global_tokens is None:
        return
    num_tokens, shape = max((of_shape(recipe.model, shape).num_tokens, tuple(shape)) for shape in shapes)
    of_shape_named = f"of shape {'x'.join(map(str, shape))}"
    for key, budget in (("global_tokens", training.global_tokens), ("micro_tokens", training.micro_tokens)):
        if budget is not None and budget < num_tokens:
            raise InputError(
                f"training.{key}: {budget} tokens cannot hold a sample {of_shape_named}, which has {num_tokens}; use "
                "at least so many, or leave out samples of this shape"
            )
    fewest = training.global_tokens // num_tokens
    if fewest < num_ranks:
        raise InputError(
            f"training.global_tokens: {training.global_tokens} tokens may be {fewest} samples {of_shape_named}, which "
            f"{num_ranks} ranks cannot share; use at least {num_ranks * num_tokens} tokens, or at most {fewest} ranks"
        )


def check_gpu(recipe: TrainRecipe, gpu: Gpu) -> None:
    """Raise InputError, which names the key, for a setting that this kind of GPU does not support."""
    if recipe.compute.float8 and not gpu.has_float8:
        raise InputError(f"compute.float8: {gpu.name} has no float8 arithmetic; set it to false, or use H100 or newer")


def notes(recipe: TrainRecipe, num_nodes: int, gpus_per_node: int) -> list[str]:
    """Return notes on settings that cost time, and on costs that the figures leave out; each names its key."""
    num_gpus, batch = num_nodes * gpus_per_node, recipe.training.global_batch
    found = []
    if batch is None:
        found.append(
            "training.global_tokens: figures are those of samples of model.latent_shape; of other shapes as many take "
            "part as have these tokens"
        )
    sp = recipe.mesh.sp
    num_groups = num_gpus // sp
    if batch is not None and batch % num_groups:
        groups = "GPUs" if sp == 1 else f"groups of {sp} GPUs"
        found.append(
            f"training.global_batch: {batch} over {num_groups} {groups} gives some {batch // num_groups} samples and "
            f"some {batch // num_groups + 1}; the former wait for the latter"
        )
    shard_size = recipe.fsdp2.shard_size
    if recipe.engine == "fsdp2" and shard_size is not None and num_nodes > 1 and shard_size > gpus_per_node:
        found.append(
            f"fsdp2.shard_size: {shard_size} spans nodes of {gpus_per_node} GPUs, so weights are gathered over the "
            f"network; {gpus_per_node} would keep that inside a node"
        )
    if recipe.compute.compile:
        found.append("compute.compile: memory is that of an eager step; a compiled one keeps less")
    if recipe.compute.float8:
        found.append("compute.float8: memory and speed are those of bf16")
    return found
