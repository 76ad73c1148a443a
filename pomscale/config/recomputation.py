"""What the modes of `compute.activation_checkpointing` mean; shared by those who wrap blocks and those who plan."""

from __future__ import annotations


def is_recomputed(mode: str, block: int) -> bool:
    """Whether block number `block`, from 0, runs again in the backward pass, from its input alone.

    mode: as ComputeConfig.activation_checkpointing; every-N recomputes blocks 0, N, 2N, ... In "selective" every block
    runs again but for its matrix products: that is not meant here.
    """
    if mode.startswith("every-"):
        return block % int(mode.removeprefix("every-")) == 0
    return mode == "full"
