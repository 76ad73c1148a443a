"""Protocol that the trainer and the checkpoints expect of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

MicroBatch = TypeVar("MicroBatch")

Assign = Callable[[nn.Parameter, Tensor], None]
InitWeights = Callable[[nn.Module, Assign], None]
"""init_weights(model, assign) calls assign(parameter, its whole value as fp32 on the CPU) once for every parameter, in
the same order and with the same values on every rank."""


class ShardableModel(Protocol):
    """An nn.Module whose repeated part can be wrapped block by block."""

    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; engines replace, wrap and compile them in place."""
        ...


@dataclass(frozen=True)
class Replicas:
    """Tensors that must be equal, bit for bit, on all ranks of a group."""

    group: dist.ProcessGroup
    tensors: Mapping[str, Tensor]


class Engine(Protocol):
    """A sharded model with its optimiser and its moving averages."""

    model: nn.Module
    device: torch.device

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[nn.Module, MicroBatch], Tensor]
    ) -> Tensor:
        """Accumulate gradients, and return this rank's share of the loss as an fp32 scalar on `device`.

        `loss` returns the micro-batch's share of the global mean loss, so that the sum over micro-batches and ranks is
        the loss of the global batch; or a vector of that and of other figures that add up, without gradient, and then
        a vector is returned. To read the result waits for the device, which is left to the caller.
        """
        ...

    def step(self, learning_rate: float, ema_weights: Mapping[str, float]) -> float:
        """Clip, step the optimiser, update the moving averages and clear gradients; return the norm before clipping.

        The gradient norm is global. When it is not finite, nothing is changed but the gradients, which are cleared.
        """
        ...

    def averaged(self, average: str) -> AbstractContextManager[None]:
        """Let the model compute with this average of the weights within the block, which all ranks enter."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the live, sharded tensors by fully qualified parameter name.

        The layout is the same for every engine, so each loads what another has saved:

            {"model": {name: tensor},
             "optimizer": {name: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": tensor}},  # AdamW
                                 {"momentum_buffer": tensor, "step": tensor}                  # a matrix of Muon
             "ema": {average: {name: tensor}}}

        A tensor is a DTensor or a FlatShard (distributed.flat_shard) of the parameter's global shape, or, if every rank
        has the whole of it, a Tensor.
        """
        ...

    def loading(self) -> AbstractContextManager[dict[str, Any]]:
        """Give `state_dict()` to be filled in place within the block, after which it counts. All ranks enter it."""
        ...

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes of storage that this rank holds between steps: "parameters", "optimizer", "ema"."""
        ...

    def replicas(self) -> Replicas | None:
        """Return the tensors that several ranks hold copies of; None where every number is on one rank only."""
        ...
