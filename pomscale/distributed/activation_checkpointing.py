"""Activation checkpointing: a block's activations, all or the cheap ones, are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pomscale.config.recomputation import is_recomputed

_aten = torch.ops.aten

# Matrix products are nearly all of a block's arithmetic. What is left, elementwise work and reductions, is bound by
# memory bandwidth: to run it again costs little. Linear maps arrive here as (add)mm, attention as the fused operator
# of whichever backend was chosen; its plain backend is made of bmm, and a softmax that runs again.
_KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten._scaled_mm.default,  # float8
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
# A whole mixer is nearly all matrix products, too; ops/pom/whole registers it, which this package may not import.
_KEPT_BY_NAME = frozenset({"pomscale::mix"})


def checkpoint_blocks(blocks: nn.ModuleList, mode: str) -> None:
    """Change the blocks in place, before they are compiled or sharded, by ComputeConfig.activation_checkpointing.

    Modes:
        none       all activations are kept
        full       every block keeps its input, and recomputes the rest
        every-N    blocks 0, N, 2N, ... keep their input; the others keep all activations
        selective  every block keeps its input and the outputs of `kept_operators()`

    Replaces `forward` rather than wrapping the module, so that parameter names are the same in every mode and a
    checkpoint of one loads in another.
    """
    for number, block in enumerate(blocks):
        if is_recomputed(mode, number):
            block.forward = _recomputing(block)
        elif mode == "selective":
            block.forward = _recomputing(block, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def kept_operators() -> list[str]:
    """Return the names of the operators whose outputs "selective" keeps, e.g. "aten.addmm"."""
    return sorted([*(str(operator).removesuffix(".default") for operator in _KEPT), *_KEPT_BY_NAME])


def _recomputing(block: nn.Module, **how: Any) -> Callable[..., Any]:
    forward = block.forward

    # A function and no partial: torch.compile would not look into torch's `checkpoint`, and would run all eagerly.
    def recomputing(*inputs: Any) -> Any:
        # The blocks draw no random numbers, so there is no generator state to save and restore.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **how)

    return recomputing


def _policy(context: SelectiveCheckpointContext, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    is_kept = operator in _KEPT or operator.name() in _KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
