"""Meaning of the modes of `compute.activation_checkpointing`, for the engine that wraps blocks and for plans."""

from __future__ import annotations


def is_recomputed(mode: str, block: int) -> bool:
    """Return whether a block runs again in the backward pass, from its input alone.

    Args:
        mode: as ComputeConfig.activation_checkpointing; every-N recomputes blocks 0, N, 2N, ... "selective" counts as
            no: there every block runs again except for its matrix products.
        block: number of the block, from 0.
    """
    if mode.startswith("every-"):
        return block % int(mode.removeprefix("every-")) == 0
    return mode == "full"
