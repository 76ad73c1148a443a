"""Bytes that each GPU sends in a step, by collective; it receives as many.

Each of n ranks sends (n - 1) / n of a tensor's bytes in an all-gather or a reduce-scatter, and twice that in an
all-reduce (ring algorithms, which are optimal in volume). The averages and AdamW need none.
"""

from __future__ import annotations

from pomscale.config.model import VideoModelConfig
from pomscale.config.recomputation import is_recomputed
from pomscale.config.train import TrainRecipe
from pomscale.plan.batch import batch_share, num_times
from pomscale.plan.memory import num_shards
from pomscale.plan.model_cost import num_block_parameters, num_parameters
from pomscale.plan.optimizer import sent_bytes
from pomscale.plan.shadow.network import build_network

_FP32, _BF16 = 4, 2


def traffic(recipe: TrainRecipe, num_gpus: int) -> dict[str, int]:
    """Return the name of each collective that is used -> bytes sent per GPU and step."""
    sent = _zero(recipe, num_gpus) if recipe.engine == "deepspeed" else _fsdp2(recipe, num_gpus)
    sent |= _sequence(recipe, num_gpus)
    shards = num_shards(recipe, num_gpus)
    network = build_network(recipe.model, num_times(recipe))
    sent["Muon's matrices"] = sent_bytes(recipe.optimizer, network, shards, num_gpus // shards)
    return {collective: round(num_bytes) for collective, num_bytes in sent.items() if num_bytes}


def _fsdp2(recipe: TrainRecipe, num_gpus: int) -> dict[str, float]:
    """Return the traffic of FSDP2.

    Weights are gathered for every micro-batch, and again for its backward pass if they were freed after the forward
    pass (the root's are not); gradients are reduced in fp32 once per step.
    """
    shards = num_shards(recipe, num_gpus)
    replicas, others = num_gpus // shards, (shards - 1) / shards
    whole = num_parameters(recipe.model)
    gathered = whole + (num_block_parameters(recipe.model) if recipe.fsdp2.reshard_after_forward else 0)
    num_micro_batches = batch_share(recipe, num_gpus).num_micro_batches
    return {
        "all-gather of weights": gathered * _itemsize(recipe) * others * num_micro_batches,
        "reduce-scatter of gradients": whole * _FP32 * others,
        "all-reduce over replicas": 2 * whole * _FP32 / shards * (replicas - 1) / replicas,
    }


def _zero(recipe: TrainRecipe, num_gpus: int) -> dict[str, float]:
    """Return the traffic of DeepSpeed's ZeRO.

    Stage 1 reduces once per step, 2 and 3 for every micro-batch, in fp32. Stages 1 and 2 gather the new weights once;
    3 gathers them for every micro-batch, and again for the backward pass if it had to free them, above 1e9 parameters.
    """
    others = (num_gpus - 1) / num_gpus
    whole = num_parameters(recipe.model)
    num_micro_batches = batch_share(recipe, num_gpus).num_micro_batches
    stage = recipe.deepspeed.zero_stage
    gathers = 1 if stage < 3 else num_micro_batches * (1 if whole <= 1_000_000_000 else 2)
    return {
        "all-gather of weights": whole * _itemsize(recipe) * others * gathers,
        "reduction of gradients": whole * _FP32 * others * (1 if stage == 1 else num_micro_batches),
    }


def _sequence(recipe: TrainRecipe, num_gpus: int) -> dict[str, float]:
    """Return the traffic of sequence parallelism: sums of tokens in fp32 for every sample and self mixer.

    Each goes out in the forward pass, again where that is repeated, and its gradient in the backward pass. Without a
    mask it is one sum and a count, reduced over the ranks; block-causal, two sums, gathered.
    """
    model, sp, mode = recipe.model, recipe.mesh.sp, recipe.compute.activation_checkpointing
    share = batch_share(recipe, num_gpus)
    width = model.degree * model.expand * model.dim
    if isinstance(model, VideoModelConfig) and model.temporal == "block_causal":
        forward = backward = 2.0 * width * (sp - 1)
    else:
        forward = backward = 2.0 * (width + 1) * (sp - 1) / sp
    num_forward = sum(2 if mode == "selective" or is_recomputed(mode, block) else 1 for block in range(model.depth))
    num_samples = share.micro_batch * share.num_micro_batches
    return {"sums of tokens, over sp": num_samples * _FP32 * (num_forward * forward + model.depth * backward)}


def _itemsize(recipe: TrainRecipe) -> int:
    return _BF16 if recipe.compute.precision == "bf16" else _FP32
