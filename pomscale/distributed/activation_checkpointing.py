"""Trade compute for memory: recompute a block's activations in the backward pass."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: nn.ModuleList, mode: str) -> None:
    """Change every block in place. mode: "none" keeps all activations, "full" keeps only each block's input.

    Replaces `forward` rather than wrapping the module, so that parameter names are the same in every mode and a
    checkpoint of one loads in another.
    """
    if mode == "none":
        return
    for block in blocks:
        # The blocks draw no random numbers, so there is no generator state to save and restore.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
