"""Engine on DeepSpeed's ZeRO 1, 2 and 3, which cuts the ranks' shards from flattened tensors, at any element.

Every rank holds fp32 master weights and the optimiser's moments for flat ranges of the parameters ("partitions"); the
moving averages live over the same ranges. The working parameters, fp32 or bf16, are made from the masters after every
step: with stages 1 and 2 every rank has all of them, with stage 3 they are gathered block by block while they are used.

Importing this module raises InputError if DeepSpeed is not installed.
"""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.config.engine import ComputeConfig, DeepSpeedConfig, OptimizerConfig
from pomscale.distributed.activation_checkpointing import checkpoint_blocks
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.world import World
from pomscale.engine.adamw_bf16 import AdamWBf16
from pomscale.engine.averages import Ema
from pomscale.engine.matrices import Matrix, MatrixRanks, block_matrices, stacked_matrices
from pomscale.engine.muon import Muon
from pomscale.engine.optimizers import build_optimizer, init_state
from pomscale.engine.protocol import InitWeights, MicroBatch, Replicas, ShardableModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
try:
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
except ImportError as error:
    raise InputError(
        f"engine: deepspeed cannot be imported ({error}); run `pip install 'pomscale[deepspeed]'`, or use engine: fsdp2"
    ) from error

# Otherwise the first use on CPUs spends a minute on compiling a shared-memory all-reduce; gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed calls collectives by names that torch 2.13 has replaced, which it would warn of at every call.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

# Otherwise DeepSpeed warns of optimisers that it has not tested; tests/distributed has these.
ZERO_SUPPORTED_OPTIMIZERS.extend([AdamWBf16, Muon])

# Elements that are reduced or gathered at once; DeepSpeed's default of 5e8 makes buffers of 2 GB.
BUCKET_ELEMENTS = 50_000_000


class _Range(NamedTuple):
    """Position of a parameter's part: its elements [start, start + size) are [offset, offset + size) of a partition."""

    partition: int
    offset: int
    size: int
    start: int


class DeepSpeedEngine:
    """Engine (see protocol.Engine) on DeepSpeed, for a model on the meta device."""

    def __init__(
        self,
        model: nn.Module,
        init_weights: InitWeights,
        world: World,
        *,
        deepspeed: DeepSpeedConfig,
        compute: ComputeConfig,
        optimizer: OptimizerConfig,
        averages: Sequence[str],
    ) -> None:
        """Shard and initialise the model.

        Args:
            model: on the meta device.
            init_weights: gives each parameter its value.
            world: the ranks that share the model.
            deepspeed: stage and offload.
            compute: precision, activation checkpointing and compile.
            optimizer: the optimiser's settings.
            averages: names of the moving averages to keep.

        Raises:
            InputError: DeepSpeed was set up for another device.
        """
        self.device = world.device
        self._num_ranks = world.size
        self._stage = deepspeed.zero_stage
        _use_device(world.device)
        on_meta = copy.deepcopy(model)
        zero_config = _zero_config(deepspeed, compute, optimizer, world.device)
        _prepare_blocks(model, compute)
        _allocate(model, zero_config, compute, world.device)
        unsharded = _optimizer_of(model, on_meta, optimizer)
        group_of = {id(p): number for number, group in enumerate(unsharded.param_groups) for p in group["params"]}
        self._deepspeed = _initialize(model, unsharded, zero_config)
        # This is DeepSpeed's wrapper, which has to see every forward pass.
        self.model: nn.Module = self._deepspeed
        self._zero = self._deepspeed.optimizer
        self._optimizer: torch.optim.Optimizer = self._zero.optimizer
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._shapes = {name: p.shape for name, p in on_meta.named_parameters()}
        self._partitions = _partitions(self._zero, deepspeed.zero_stage)
        self._ranges = {name: _range_of(self._zero, p, group_of[id(p)]) for name, p in self._parameters.items()}
        matrices = block_matrices(on_meta) if optimizer.name == "muon" else {}
        with_matrices = {self._ranges[name].partition for name in matrices}
        for number, partition in enumerate(self._partitions):
            init_state(self._optimizer, partition, optimizer, is_matrix=number in with_matrices)
        if isinstance(self._optimizer, Muon):
            assert dist.group.WORLD is not None
            self._optimizer.place(self._matrices(matrices), MatrixRanks(world.device, dist.group.WORLD))
        self._init_weights(on_meta, init_weights)
        self._ema = Ema(averages, [partition.detach() for partition in self._partitions])

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[nn.Module, MicroBatch], Tensor]
    ) -> Tensor:
        """Accumulate gradients (see Engine); they are reduced over ranks with the last micro-batch, or with each one.

        Stages 2 and 3 reduce with each one, since between micro-batches they hold only this rank's part.
        """
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            self._deepspeed.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            share = loss(self.model, micro_batch)
            # DeepSpeed averages gradients over ranks; our shares already add up to the global mean.
            self._deepspeed.backward(share.view(-1)[0] * self._num_ranks)
            total = total + share.detach()
        return total

    def step(self, learning_rate: float, ema_weights: Mapping[str, float]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed changes nothing if the norm is not finite, and reports it as infinite.
        self._deepspeed.step()
        norm = float(self._deepspeed.get_global_grad_norm())
        if math.isfinite(norm):
            self._ema.update(ema_weights)
        return norm

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        """Compute with an average within the block (see Engine).

        After an exception the model keeps the average: to restore it would be to wait for ranks that may not come.
        """
        with self._ema.swapped_in(average):
            self._refresh_working()
            yield
        self._refresh_working()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self._shards(self._partitions),
            "optimizer": {name: self._optimizer_state(name) for name in self._ranges},
            "ema": {average: self._shards(tensors) for average, tensors in self._ema.averages.items()},
        }

    @contextmanager
    def loading(self) -> Iterator[dict[str, Any]]:
        yield self.state_dict()
        self._refresh_working()

    def resident_bytes(self) -> dict[str, int]:
        moments = [t for p in self._partitions for t in self._optimizer.state[p].values()]
        averages = [t for tensors in self._ema.averages.values() for t in tensors]
        held = {"parameters": [*self._partitions, *self._working()], "optimizer": moments, "ema": averages}
        return {part: _storage_bytes(tensors) for part, tensors in held.items()}

    def replicas(self) -> Replicas | None:
        if self._stage == 3:
            return None
        assert dist.group.WORLD is not None
        return Replicas(dist.group.WORLD, {name: p.detach() for name, p in self._parameters.items()})

    @torch.no_grad()
    def _init_weights(self, on_meta: nn.Module, init_weights: InitWeights) -> None:
        """Set the fp32 masters, one whole parameter at a time; bf16 working parameters would lose digits."""
        names = {parameter: name for name, parameter in on_meta.named_parameters()}
        masters = self._shards(self._partitions)

        def assign(parameter: nn.Parameter, full: Tensor) -> None:
            shard = masters[names[parameter]]
            shard.values.copy_(full.flatten()[shard.start :][: shard.values.numel()])

        init_weights(on_meta, assign)
        self._refresh_working()

    @torch.no_grad()
    def _refresh_working(self) -> None:
        """Make the working parameters from the masters, which have changed. All ranks call it."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._deepspeed.empty_partition_cache()  # gathered parameters are out of date
        for working, master in zip(self._zero.fp16_partitioned_groups_flat, self._partitions, strict=True):
            working.copy_(master)
        if self.device.type == "cuda":  # DeepSpeed gathers on another stream, which does not wait for this one
            torch.cuda.current_stream(self.device).synchronize()

    def _working(self) -> list[Tensor]:
        return [p.ds_tensor if self._stage == 3 else p for p in self._parameters.values()]

    def _shards(self, tensors: list[Tensor]) -> dict[str, FlatShard]:
        return {name: self._shard(name, tensors[self._ranges[name].partition]) for name in self._ranges}

    def _shard(self, name: str, tensor: Tensor) -> FlatShard:
        """Return this rank's part of a parameter, moment or average in a tensor that is laid out like its partition."""
        of = self._ranges[name]
        return FlatShard(self._shapes[name], of.start, tensor[of.offset :][: of.size])

    def _optimizer_state(self, name: str) -> dict[str, Tensor]:
        state = self._optimizer.state[self._partitions[self._ranges[name].partition]]
        return {key: value if key == "step" else self._shard(name, value) for key, value in state.items()}

    def _matrices(self, numbers: Mapping[str, int]) -> Iterator[Matrix]:
        """Yield the matrices of the parameters whose rows stack so many. A collective: each rank tells its ranges."""
        own = [(self._ranges[name].start, self._ranges[name].start + self._ranges[name].size) for name in numbers]
        ranges = torch.empty(self._num_ranks, len(own), 2, dtype=torch.int64, device=self.device)
        dist.all_gather_into_tensor(ranges, torch.tensor(own, device=self.device)[None])
        for (name, number), of_ranks in zip(numbers.items(), ranges.transpose(0, 1).tolist(), strict=True):
            of, shape = self._ranges[name], self._shapes[name]
            partition = self._partitions[of.partition]
            yield from stacked_matrices(partition, shape, number, of_ranks, dist.get_rank(), of.offset)


def _use_device(device: torch.device) -> None:
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise InputError(
            f"compute.device: {device.type}, but DeepSpeed is set up for {accelerator}; "
            f"run with DS_ACCELERATOR={device.type} in the environment"
        )
    # DeepSpeed takes its device from this variable. Not all launchers set it, and not all count the same.
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)


def _zero_config(
    config: DeepSpeedConfig, compute: ComputeConfig, optimizer: OptimizerConfig, device: torch.device
) -> dict[str, Any]:
    in_host_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        # Otherwise small parameters would stay gathered, and have to be updated twice. A block's are gathered together.
        "stage3_param_persistence_threshold": 0,
        # DeepSpeed's F.linear adds the bias in place to a product that "selective" has kept: recomputed, the bias
        # counts twice. Without this F.linear a linear map holds its gathered weight until the backward pass, unless it
        # is recomputed.
        "memory_efficient_linear": compute.activation_checkpointing != "selective",
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = in_host_memory
    if config.offload_parameters:
        zero["offload_param"] = in_host_memory
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's takes minutes to compile; torch's is fused on CPUs too
        "bf16": {"enabled": compute.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": optimizer.grad_clip or 0.0,
        # The caller makes the batches; DeepSpeed only checks that these numbers multiply up.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }


def _prepare_blocks(model: nn.Module, compute: ComputeConfig) -> None:
    """Apply activation checkpointing, then compile, which wraps it."""
    shardable: ShardableModel = model  # type: ignore[assignment]  # nn.Module hides attributes from protocols
    blocks = shardable.blocks()
    checkpoint_blocks(blocks, compute.activation_checkpointing)
    for block in blocks:
        # Stage 3 gathers and frees the whole block by hooks around it. Hooks inside would break up the compiled code.
        deepspeed.utils.set_z3_leaf_module(block, True)
        if compute.compile:
            block.forward = torch.compile(block.forward)


def _allocate(model: nn.Module, zero_config: dict[str, Any], compute: ComputeConfig, device: torch.device) -> None:
    """Allocate the working parameters, with undefined content; with stage 3 one module at a time, sharded at once."""
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if zero_config["zero_optimization"]["stage"] < 3:
        model.to_empty(device=device)
        return
    for module in reversed(list(model.modules())):  # children before their parents: Init takes all below a module
        module.to_empty(device=device, recurse=False)
        deepspeed.zero.Init(module=module, config_dict_or_path=zero_config)


def _optimizer_of(model: nn.Module, on_meta: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return an optimiser of `model`'s parameters without a state, which belongs to DeepSpeed's partitions of them."""
    names = {parameter: name for name, parameter in on_meta.named_parameters()}
    optimizer = build_optimizer(on_meta, config)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[parameter]) for parameter in group["params"]]
    return optimizer


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, zero_config: dict[str, Any]) -> Any:
    with redirect_stdout(io.StringIO()):  # stage 1 in bf16 prints the memory in use; its warnings go to stderr
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config)
    return engine


def _partitions(zero: Any, stage: int) -> list[Tensor]:
    """Return the flat fp32 tensors that the optimiser steps on this rank."""
    if stage == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in zero.optimizer.param_groups]


def _range_of(zero: Any, parameter: Any, group: int) -> _Range:
    """Return the position of this rank's part of a parameter of the optimiser's `group`, without padding."""
    if hasattr(parameter, "ds_tensor"):  # stage 3 cuts every parameter into equal parts
        partition, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = min(dist.get_rank() * size, parameter.ds_numel)
        return _Range(partition, offset, min(size, parameter.ds_numel - start), start)
    mapping = parameter._hp_mapping  # stages 1 and 2 cut a whole group of parameters, one after the other
    if mapping is None:
        return _Range(group, 0, 0, 0)
    inside, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Range(mapping.param_group_index, inside.start, inside.numel, of_parameter.start)


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once: many are views of one flat tensor."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
