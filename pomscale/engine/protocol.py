"""What the trainer and the checkpoints ask of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

MicroBatch = TypeVar("MicroBatch")


class ShardableModel(Protocol):
    """An nn.Module whose repeated part can be wrapped block by block."""

    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; engines replace, wrap and compile them in place."""
        ...


class Engine(Protocol):
    """A sharded model with its optimiser and its moving average."""

    model: nn.Module
    device: torch.device

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[nn.Module, MicroBatch], Tensor]
    ) -> float:
        """Accumulate gradients. `loss` gives the micro-batch's share of the global mean loss, so that the sum over
        micro-batches and ranks is the loss of the global batch. Returns this rank's share."""
        ...

    def step(self, learning_rate: float, ema_weight: float) -> float:
        """Clip, step the optimiser, update the moving average, clear gradients; returns the global gradient norm
        before clipping. Nothing is changed when the norm is not finite."""
        ...

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the block the model computes with the averaged weights. All ranks enter it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """{"model", "optimizer", "ema"}: by fully qualified parameter name, the live, sharded tensors.

        A checkpoint is loaded by filling them in place.
        """
        ...
