"""FSDP2: every block and the root are sharded over the mesh; parameters are fp32, compute is fp32 or bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pomscale.config.engine import ComputeConfig, OptimizerConfig
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.distributed.world import World
from pomscale.engine.ema import Ema
from pomscale.engine.optim import build_optimizer
from pomscale.engine.protocol import MicroBatch, ShardableModel

Assign = Callable[[nn.Parameter, Tensor], None]


def assign_shard(parameter: nn.Parameter, full: Tensor) -> None:
    """Give a sharded parameter this rank's part of `full` (CPU, equal on all ranks). No communication."""
    assert isinstance(parameter, DTensor)
    full = full.to(parameter.device)
    part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(part)


class Fsdp2Engine:
    """See protocol.Engine. Takes a model on the meta device, so that no rank ever holds the whole of it."""

    def __init__(
        self,
        model: nn.Module,
        init_weights: Callable[[nn.Module, Assign], None],
        world: World,
        compute: ComputeConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        """init_weights(model, assign) must call assign(parameter, full tensor) once for every parameter."""
        self.model = model
        self.device = world.device
        self._num_ranks = world.size
        self._grad_clip = optimizer.grad_clip if optimizer.grad_clip is not None else math.inf
        shard_model(model, world, compute)
        model.to_empty(device=world.device)
        init_weights(model, assign_shard)
        # The sharded parameters. While a module's parameters are gathered, model.parameters() gives other tensors.
        self._parameters = dict(model.named_parameters())
        self.ema = Ema(self._parameters)
        self.optimizer = build_optimizer(model, optimizer)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[nn.Module, MicroBatch], Tensor]
    ) -> float:
        assert isinstance(self.model, FSDPModule)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            # Gradients are reduced over ranks once per step, with the last micro-batch.
            self.model.set_requires_gradient_sync(i == len(micro_batches) - 1)
            share = loss(self.model, micro_batch)
            # FSDP averages gradients over ranks; our shares already add up to the global mean.
            (share * self._num_ranks).backward()
            total += share.detach()
        return total.item()

    def step(self, learning_rate: float, ema_weight: float) -> float:
        parameters = self._parameters.values()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        value = norm.item()
        if math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.ema.update(ema_weight)
        self.optimizer.zero_grad()
        return value

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        with self.ema.swapped_in():
            try:
                yield
            finally:
                # Without a backward pass FSDP keeps the root's gathered parameters: they would be the averages.
                self.model.reshard()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": {name: p.detach() for name, p in self._parameters.items()},
            "optimizer": {name: self.optimizer.state[p] for name, p in self._parameters.items()},
            "ema": dict(self.ema.averages),
        }


def shard_model(model: nn.Module, world: World, compute: ComputeConfig) -> None:
    """Activation checkpointing, compile, FSDP, in this order: each wraps what the one before made."""
    shardable: ShardableModel = model  # type: ignore[assignment]  # nn.Module hides attributes from protocols
    checkpoint_blocks(shardable.blocks(), compute.activation_checkpointing)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        # The model casts for itself: a bf16 t would have 3 digits, and 1000 t none after the point.
        cast_forward_inputs=False,
    )
    for block in shardable.blocks():
        if compute.compile:
            block.compile()
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
