"""Memory of a training step of engine/deepspeed.py: what each stage of ZeRO holds in DeepSpeed 0.19.

Working weights, fp32 or bf16, are made from fp32 masters; masters, moments and averages are shared out over the ranks.
    stage 1    every rank has all working weights, and all gradients until the end of the backward pass, in fp32: held
               at all times by BF16_Optimizer, in bf16 unless the optimizer is offloaded; else summed up beside the
               weights by DeepSpeedZeroOptimizer, which also makes stage 2
    stage 2    gradients are reduced through a bucket as they come; this rank's part of them stays
    stage 3    working weights are sharded too; they are gathered ahead of their use and stay, up to 1e9 of them
"""

from __future__ import annotations

from pomscale.config.engine import ComputeConfig, DeepSpeedConfig, OptimizerConfig
from pomscale.plan.optimizer import moment_bytes
from pomscale.plan.shadow.ledger import Part, Storage
from pomscale.plan.shadow.network import AnyBlock, Network
from pomscale.plan.shadow.operators import BF16, FP32, Weight
from pomscale.plan.shadow.step import StepShadow, num_elements
from pomscale.plan.shadow.tensor import Tensor

BUCKET_ELEMENTS = 50_000_000
"""Value of reduce_bucket_size and allgather_bucket_size in the engine; stage 3 prefetches as many by default."""
_MAX_FLAT_ELEMENTS = 500_000_000  # stage 1 in bf16 reduces its fp32 gradients in pieces of this size
_MAX_LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters, stage3_max_reuse_distance


class ZeroShadow(StepShadow):
    """Step of ZeRO: `run` it once, and the ledger knows the peak. num_ranks ranks share what the stage shards."""

    def __init__(
        self, network: Network, compute: ComputeConfig, deepspeed: DeepSpeedConfig, *, num_ranks: int,
        num_averages: int, optimizer: OptimizerConfig,
    ) -> None:  # fmt: skip
        super().__init__(network, BF16 if compute.precision == "bf16" else FP32, compute.activation_checkpointing)
        self.stage, self.num_averages, self.optimizer = deepspeed.zero_stage, num_averages, optimizer
        self.offload_optimizer, self.offload_parameters = deepspeed.offload_optimizer, deepspeed.offload_parameters
        self.by_bf16_optimizer = self.stage == 1 and self.tape.itemsize != FP32 and not self.offload_optimizer
        self.sums_beside_weights = self.stage == 1 and not self.by_bf16_optimizer
        self.sums: list[Storage] = []
        self.root_weights = self.network.root_weights()
        self.weights = list(self.network.weights())
        self.num_whole = num_elements(self.weights)
        self.num_local = -(-self.num_whole // num_ranks)
        self.num_ranks = num_ranks
        self.held: list[Storage] = []
        self.num_in_bucket = 0

    def hold(self, part: Part, num_bytes: int) -> None:
        self.held.append(Storage(self.ledger, part, num_bytes))

    def run(self, micro_batch: int, num_micro_batches: int) -> None:
        """Run the last micro-batch of a step."""
        self._hold_resident()
        self._hold_working()
        self.has_sums = self.sums_beside_weights and num_micro_batches > 1  # of the micro-batches before
        if self.by_bf16_optimizer:
            self.hold("gradients", self.num_whole * FP32)
        elif self.has_sums:
            self.sums.append(Storage(self.ledger, "gradients", self.num_whole * FP32))
        elif self.stage == 3 or (self.stage == 2 and num_micro_batches > 1):
            self._hold_local_gradients(self.num_local)
        if self.stage == 3:
            self.hold("reduction", BUCKET_ELEMENTS * FP32)
        self.micro_batch(micro_batch)

    def _hold_resident(self) -> None:
        if self.offload_optimizer:
            return
        self.hold("parameters", self.num_local * FP32)
        self.hold("optimizer", moment_bytes(self.optimizer, self.network, self.weights, self.num_local))
        self.hold("ema", self.num_local * FP32 * self.num_averages)

    def _hold_working(self) -> None:
        itemsize = self.tape.itemsize
        if self.stage < 3:
            self.hold("parameters", self.num_whole * itemsize)
        else:
            if not self.offload_parameters:
                self.hold("parameters", self.num_local * itemsize)
            self.hold("gathered", min(self.num_whole, _MAX_LIVE_ELEMENTS) * itemsize)
        nothing = Storage(self.ledger, "parameters", 0)
        for weight in self.network.weights():
            weight.tensor = Tensor(self.tape, weight.shape, itemsize, nothing)

    def _hold_local_gradients(self, num_local: int) -> None:
        if not self.offload_optimizer:
            self.hold("gradients", num_local * FP32)

    def before_forward(self, block: AnyBlock | None) -> None:
        if block is None and self.stage == 3:
            # Weights are fetched together, as many as are prefetched up to the end of a block; copied out, and freed.
            largest = max(num_elements(block.weights()) for block in self.network.blocks)
            fetched = min(self.num_whole, BUCKET_ELEMENTS + largest)
            Storage(self.ledger, "gathered", fetched * self.tape.itemsize)

    def begin_backward(self) -> None:
        if self.stage < 3 and not self.by_bf16_optimizer:
            self.hold("reduction", BUCKET_ELEMENTS * (self.tape.itemsize if self.stage == 2 else FP32))

    def after_backward(self, block: AnyBlock | None) -> None:
        weights = self.root_weights if block is None else block.weights()
        if self.stage > 1:
            self._reduce(weights)
        elif self.sums_beside_weights:
            self._add_to_sums(weights)
        if block is None:
            self._finish()

    def _add_to_sums(self, weights: list[Weight]) -> None:
        """Replace gradients by fp32 sums over micro-batches."""
        for weight in weights:
            weight.leaf.gradient = None
            if not self.has_sums:
                self.sums.append(Storage(self.ledger, "gradients", num_elements([weight]) * FP32))

    def _reduce(self, weights: list[Weight]) -> None:
        """Reduce gradients through the bucket, which is emptied when the next gradient does not fit."""
        for weight in weights[::-1]:
            size = num_elements([weight])
            if self.num_in_bucket + size > BUCKET_ELEMENTS:
                self._empty_bucket()
            self.num_in_bucket += size
            weight.leaf.gradient = None

    def _empty_bucket(self) -> None:
        """Reduce the gradients of the bucket.

        They are joined and, where its precision is another one, cast to that of the reduction. Stage 3 reduces in
        place, and its part of the gradients is there all the time.
        """
        if self.stage < 3:
            copies = FP32 if self.tape.itemsize == FP32 else FP32 + self.tape.itemsize
            Storage(self.ledger, "reduction", self.num_in_bucket * copies)
            self._hold_local_gradients(-(-self.num_in_bucket // self.num_ranks))
        self.num_in_bucket = 0

    def _finish(self) -> None:
        if self.stage > 1:
            self._empty_bucket()
        elif self.sums_beside_weights:
            self._reduce_sums()
        else:
            self.hold("reduction", min(self.num_whole, _MAX_FLAT_ELEMENTS) * FP32)

    def _reduce_sums(self) -> None:
        """Move the sums into the bucket until it is full, and reduce a copy of it.

        In bf16 this rank's part of them is then kept on the GPU, also where the optimizer is offloaded.
        """
        num_moved = min(self.num_whole, BUCKET_ELEMENTS)
        self.sums.clear()
        self.hold("gradients", (self.num_whole - num_moved) * FP32)
        if self.tape.itemsize != FP32:
            self.hold("gradients", self.num_local * FP32)
        Storage(self.ledger, "reduction", num_moved * FP32)
        if self.tape.itemsize == FP32:
            self._hold_local_gradients(self.num_local)
