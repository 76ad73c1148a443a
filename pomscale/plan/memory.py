"""Peak memory of one GPU in a training step, and host memory per GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pomscale.config.engine import ComputeConfig
from pomscale.config.train import TrainRecipe
from pomscale.plan.batch import BatchShare, batch_share, num_times, with_local_tokens
from pomscale.plan.model_cost import num_parameters
from pomscale.plan.optimizer import moment_bytes
from pomscale.plan.shadow.fsdp2 import Fsdp2Shadow
from pomscale.plan.shadow.ledger import Part
from pomscale.plan.shadow.network import build_network
from pomscale.plan.shadow.zero import ZeroShadow

_FP32, _BF16 = 4, 2


@dataclass(frozen=True)
class StepMemory:
    """Peak of a step in bytes.

    `by_part` adds up to `peak`; `moment` names the moment of the peak. The CUDA context, communication buffers and
    fragments of the allocator are not included, which is why not all of a GPU's memory counts as usable.
    """

    peak: int
    by_part: dict[Part, int]
    moment: str


def step_memory(recipe: TrainRecipe, num_gpus: int, share: BatchShare | None = None) -> StepMemory:
    """Return the peak memory of an eager step; a compiled one, whose elementwise work is fused, needs at most that.

    Args:
        recipe: training recipe.
        num_gpus: number of GPUs, a multiple of fsdp2.shard_size (`checks.check_layout`).
        share: samples of this GPU, if not those that the recipe gives.
    """
    share = share or batch_share(recipe, num_gpus)
    local = with_local_tokens(recipe)
    network = build_network(local.model, num_times(local))
    compute = recipe.compute
    # As layers/mlp.py and layers/pom.py decide.
    if compute.float8 or (recipe.engine == "deepspeed" and recipe.deepspeed.zero_stage == 3):
        network.layer_feed_forwards()
    if not compute.float8 and (compute.device == "cpu" or compute.mixer_memory == "lean"):
        network.use_whole_mixers(compute.mixer_memory, _block_rows(compute), split=recipe.mesh.sp > 1)
    shadow: Fsdp2Shadow | ZeroShadow
    if recipe.engine == "deepspeed":
        shadow = ZeroShadow(
            network,
            recipe.compute,
            recipe.deepspeed,
            num_ranks=num_gpus,
            num_averages=len(recipe.ema.averages),
            optimizer=recipe.optimizer,
        )
    else:
        shadow = Fsdp2Shadow(
            network,
            recipe.compute,
            recipe.fsdp2,
            num_shards=num_shards(recipe, num_gpus),
            num_averages=len(recipe.ema.averages),
            optimizer=recipe.optimizer,
        )
    shadow.run(share.micro_batch, share.num_micro_batches)
    by_part = {part: num_bytes for part, num_bytes in shadow.ledger.at_peak.items() if num_bytes}
    # Every GPU has all of its samples' data, noise and their mixture, of whose tokens it computes a part.
    others = 3 * _FP32 * (math.prod(recipe.model.latent_shape) - math.prod(local.model.latent_shape))
    if others > 0:
        by_part["activations"] += others * share.micro_batch
    return StepMemory(sum(by_part.values()), by_part, shadow.ledger.moment)


def _block_rows(compute: ComputeConfig) -> int:
    """Mirror ops/pom/whole: kernels in C++ for fp32 on a CPU, else blocks of rows in PyTorch."""
    if compute.device != "cpu":
        return 256
    return 0 if compute.precision == "fp32" else 64


def num_shards(recipe: TrainRecipe, num_gpus: int) -> int:
    """Return the number of GPUs that share one copy of the training state."""
    return num_gpus if recipe.engine == "deepspeed" else recipe.fsdp2.shard_size or num_gpus


def state_bytes(recipe: TrainRecipe) -> int:
    """Return the bytes of a checkpoint: weights, the optimiser's moments, moving averages."""
    network = build_network(recipe.model, num_times(recipe))
    parameters = num_parameters(recipe.model)
    moments = moment_bytes(recipe.optimizer, network, list(network.weights()), parameters)
    return parameters * _FP32 * (1 + len(recipe.ema.averages)) + moments


def host_bytes(recipe: TrainRecipe, num_gpus: int) -> int:
    """Return the bytes of host memory per GPU: offloaded state, and the copy that an asynchronous save writes."""
    shards = num_shards(recipe, num_gpus)
    parameters = num_parameters(recipe.model)
    num_bytes = 0
    if recipe.engine == "deepspeed":
        if recipe.deepspeed.offload_optimizer:
            num_bytes += (state_bytes(recipe) + parameters * _FP32) // shards  # gradients are there, too
            if recipe.deepspeed.zero_stage < 3 and recipe.compute.precision == "bf16":
                num_bytes += parameters * _BF16 // shards  # new working weights, on their way to the GPU
        if recipe.deepspeed.offload_parameters:
            num_bytes += parameters * (_BF16 if recipe.compute.precision == "bf16" else _FP32) // shards
    elif recipe.fsdp2.cpu_offload:
        num_bytes += (state_bytes(recipe) + parameters * _FP32) // shards
    if recipe.checkpoint.asynchronous:
        num_bytes += state_bytes(recipe) // num_gpus  # each replica saves a part
    return num_bytes
