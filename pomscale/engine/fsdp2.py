"""Engine on FSDP2: every block and the root are sharded; parameters are fp32, compute is fp32 or bf16.

Parameters are sharded along their first axis over the mesh's "shard" dimension. HSDP adds a "replicate" dimension: each
row of ranks holds a whole copy, gradients are reduced within a copy, then over the copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pomscale.config.engine import ComputeConfig, Fsdp2Config, OptimizerConfig
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.distributed.flat_shard import local_part
from pomscale.distributed.world import World
from pomscale.engine.averages import Ema
from pomscale.engine.optimizers import build_optimizer
from pomscale.engine.protocol import InitWeights, MicroBatch, Replicas, ShardableModel


def assign_shard(parameter: nn.Parameter, full: Tensor) -> None:
    """Give a sharded parameter this rank's part of `full` (CPU, equal on all ranks). No communication."""
    assert isinstance(parameter, DTensor)
    full = full.to(parameter.device)
    part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(part)


class Fsdp2Engine:
    """Engine (see protocol.Engine) on FSDP2. The model is on the meta device, so that no rank ever holds all of it."""

    def __init__(
        self,
        model: nn.Module,
        init_weights: InitWeights,
        world: World,
        *,
        fsdp2: Fsdp2Config,
        compute: ComputeConfig,
        optimizer: OptimizerConfig,
        averages: Sequence[str],
    ) -> None:
        """Shard and initialise the model.

        Args:
            model: on the meta device.
            init_weights: gives each parameter its value.
            world: the ranks that share the model; their number is a multiple of fsdp2.shard_size.
            fsdp2: sharding, prefetch and offload.
            compute: precision, activation checkpointing and compile.
            optimizer: the optimiser's settings and the limit of the gradient norm.
            averages: names of the moving averages to keep.
        """
        self.model = model
        self.device = world.device
        self._num_ranks = world.size
        self._grad_clip = optimizer.grad_clip if optimizer.grad_clip is not None else math.inf
        self._mesh = _mesh(world, fsdp2.shard_size)
        shard_model(model, self._mesh, fsdp2, compute)
        model.to_empty(device="cpu" if fsdp2.cpu_offload else world.device)
        init_weights(model, assign_shard)
        # These are the sharded parameters: while a module is gathered, model.parameters() gives other tensors.
        self._parameters = {name: _as_dtensor(p) for name, p in model.named_parameters()}
        self._ema = Ema(averages, [local_part(p) for p in self._parameters.values()])
        self._optimizer = build_optimizer(model, optimizer)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[nn.Module, MicroBatch], Tensor]
    ) -> Tensor:
        assert isinstance(self.model, FSDPModule)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            # Gradients are reduced over ranks once per step, with the last micro-batch.
            is_last = i == len(micro_batches) - 1
            self.model.set_requires_gradient_sync(is_last)
            self.model.set_is_last_backward(is_last)
            share = loss(self.model, micro_batch)
            # FSDP averages gradients over ranks; our shares already add up to the global mean.
            (share.view(-1)[0] * self._num_ranks).backward()
            total = total + share.detach()
        return total

    def step(self, learning_rate: float, ema_weights: Mapping[str, float]) -> float:
        parameters = self._parameters.values()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._mesh.ndim == 2:
            # Each copy sums in its own communicator, maybe in another order: the last digit would differ.
            dist.broadcast(norm, group=self._mesh.get_group("replicate"), group_src=0)
        value = norm.item()
        if math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._ema.update(ema_weights)
        self._optimizer.zero_grad()
        return value

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        self._free_gathered()
        with self._ema.swapped_in(average):
            try:
                yield
            finally:
                self._free_gathered()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": {name: p.detach() for name, p in self._parameters.items()},
            "optimizer": {name: dict(self._optimizer.state[p]) for name, p in self._parameters.items()},
            "ema": {
                average: {
                    name: _like(local, parameter)
                    for (name, parameter), local in zip(self._parameters.items(), tensors, strict=True)
                }
                for average, tensors in self._ema.averages.items()
            },
        }

    @contextmanager
    def loading(self) -> Iterator[dict[str, Any]]:
        yield self.state_dict()
        self._free_gathered()

    def resident_bytes(self) -> dict[str, int]:
        moments = [t for state in self._optimizer.state.values() for t in state.values()]
        averages = [t for tensors in self._ema.averages.values() for t in tensors]
        held = {"parameters": self._parameters.values(), "optimizer": moments, "ema": averages}
        return {part: sum(local_part(t).untyped_storage().nbytes() for t in tensors) for part, tensors in held.items()}

    def replicas(self) -> Replicas | None:
        if self._mesh.ndim == 1:
            return None
        tensors = {name: local_part(p) for name, p in self._parameters.items()}
        return Replicas(self._mesh.get_group("replicate"), tensors)

    def _free_gathered(self) -> None:
        """Free gathered parameters, now out of date; without a backward pass FSDP keeps some, always the root's."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard_model(model: nn.Module, mesh: DeviceMesh, fsdp2: Fsdp2Config, compute: ComputeConfig) -> None:
    """Apply activation checkpointing, compile and FSDP, in this order: each wraps the result of the one before."""
    shardable: ShardableModel = model  # type: ignore[assignment]  # nn.Module hides attributes from protocols
    blocks = shardable.blocks()
    checkpoint_blocks(blocks, compute.activation_checkpointing)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        # The model casts its inputs: a bf16 t would have 3 digits, and 1000 t none after the point.
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if fsdp2.cpu_offload else OffloadPolicy()
    for block in blocks:
        if compute.compile:
            block.compile()
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=fsdp2.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if fsdp2.prefetch:
        _prefetch(list(blocks), fsdp2.prefetch)


def _prefetch(blocks: list[nn.Module], num_ahead: int) -> None:
    """Gather blocks ahead of the one that computes: the next ones in the forward pass, those before in the backward."""
    for direction in (blocks, blocks[::-1]):
        for i, block in enumerate(direction):
            following: list[Any] = direction[i + 1 : i + 1 + num_ahead]
            assert isinstance(block, FSDPModule)
            if direction is blocks:
                block.set_modules_to_forward_prefetch(following)
            else:
                block.set_modules_to_backward_prefetch(following)


def _mesh(world: World, shard_size: int | None) -> DeviceMesh:
    device_type = world.device.type
    if shard_size is None or shard_size == world.size:
        return init_device_mesh(device_type, (world.size,), mesh_dim_names=("shard",))
    assert world.size % shard_size == 0, "plan.checks.check_layout"
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _as_dtensor(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter


def _like(local: Tensor, parameter: DTensor) -> DTensor:
    """Return the sharded tensor of which `local` is this rank's part, laid out like the parameter."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
