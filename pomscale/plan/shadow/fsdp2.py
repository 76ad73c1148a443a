"""Memory of a training step of engine/fsdp2.py: when FSDP2 (torch.distributed.fsdp) gathers, frees and reduces.

Weights rest as fp32 shards. A group is gathered through one flat buffer in the precision of compute, from which its
weights are copied out; gradients are copied into one flat fp32 buffer, which is reduced and scattered.
"""

from __future__ import annotations

from collections.abc import Sequence

from pomscale.config.engine import ComputeConfig, Fsdp2Config, OptimizerConfig
from pomscale.plan.optimizer import moment_bytes, step_bytes
from pomscale.plan.shadow.ledger import Part, Storage
from pomscale.plan.shadow.network import AnyBlock, Network
from pomscale.plan.shadow.operators import BF16, FP32, Weight
from pomscale.plan.shadow.step import StepShadow, num_elements
from pomscale.plan.shadow.tensor import Tensor

# AdamWBf16 holds, per element of the weight that it steps: two moments in fp32, random bits, and two sums of bits.
_BF16_STEP_BYTES = 20


class _Group:
    """Weights that are gathered and reduced together."""

    def __init__(self, step: Fsdp2Shadow, weights: Sequence[Weight]) -> None:
        self.step, self.weights = step, weights
        self.num_local = num_elements(weights, step.num_shards)
        self.num_padded = self.num_local * step.num_shards
        self.buffer: Storage | None = None
        self.gathered = False
        self.accumulated: list[Tensor] = []
        self.reduced: Storage | None = None

    def gather(self) -> None:
        """Start gathering, into a flat buffer. A single rank has all weights and gathers nothing."""
        step, itemsize = self.step, self.step.tape.itemsize
        if step.num_shards > 1 and not self.gathered and self.buffer is None:
            cast = None if itemsize == FP32 else step.allocate("gathered", self.num_local * itemsize)
            self.buffer = step.allocate("gathered", self.num_padded * itemsize)
            del cast

    def finish_gathering(self, *, forward: bool) -> None:
        """Copy the weights out of the buffer, which in the forward pass stays until the next group's is there."""
        if self.gathered:
            return
        self.gather()
        before = self.step.last_buffer
        tape = self.step.tape
        storage = self.step.allocate("gathered", self.num_padded * tape.itemsize)
        for weight in self.weights:
            weight.tensor = Tensor(tape, weight.shape, tape.itemsize, storage)
        self.gathered = True
        self.step.last_buffer = self.buffer if forward else None
        self.buffer = None
        del before  # FSDP2 drops it earlier, except for a local name

    def free(self) -> None:
        for weight in self.weights:
            weight.tensor = None
        self.gathered = False

    def hold_whole_gradients(self) -> None:
        """Allocate whole fp32 gradients of earlier micro-batches, since nothing is reduced between micro-batches."""
        for weight in self.weights:
            gradient = self.step.tape.new(weight.shape, FP32, "gradients")
            if self.step.tape.itemsize == FP32:
                weight.leaf.gradient = gradient
            else:  # gradients of the micro-batch are in another precision, and added to these
                self.accumulated.append(gradient)

    def reduce(self) -> None:
        """Average the gradients over the shards; this rank's part stays."""
        if self.accumulated:  # the gradients of this micro-batch have been added to them
            for weight in self.weights:
                weight.leaf.gradient = None
        self.step.last_reduction = None
        self.step.last_reduction = self.step.allocate("reduction", self.num_padded * FP32)
        for weight in self.weights:
            weight.leaf.gradient = None
        self.accumulated = []
        self.reduced = self.step.allocate("gradients", self.num_local * FP32)
        if self.step.offload:
            self.reduced = None


class Fsdp2Shadow(StepShadow):
    """Step of FSDP2: `run` it once, and the ledger knows the peak. num_shards ranks share one copy of the state."""

    def __init__(
        self, network: Network, compute: ComputeConfig, fsdp2: Fsdp2Config, *, num_shards: int,
        num_averages: int, optimizer: OptimizerConfig,
    ) -> None:  # fmt: skip
        super().__init__(network, BF16 if compute.precision == "bf16" else FP32, compute.activation_checkpointing)
        self.num_shards, self.num_averages, self.optimizer = num_shards, num_averages, optimizer
        self.reshard, self.offload, self.prefetch = fsdp2.reshard_after_forward, fsdp2.cpu_offload, fsdp2.prefetch
        self.groups = [_Group(self, block.weights()) for block in self.network.blocks]
        self.root = _Group(self, self.network.root_weights())
        self.last_buffer: Storage | None = None
        self.last_reduction: Storage | None = None

    def allocate(self, part: Part, num_bytes: int) -> Storage:
        return Storage(self.ledger, part, num_bytes)

    def run(self, micro_batch: int, num_micro_batches: int) -> None:
        """Run the last micro-batch of a step, which needs most: it starts with the gradients of those before it."""
        resident = self._resident()
        if num_micro_batches > 1:
            for group in (self.root, *self.groups):
                group.hold_whole_gradients()
        self.micro_batch(micro_batch)
        self.ledger.now = "optimizer"
        if self.optimizer.name == "muon":
            self.allocate("optimizer", step_bytes(self.optimizer.muon, self.network, self.num_shards))
        if self.optimizer.moments == "bf16" and not self.offload:
            largest = max(num_elements([weight], self.num_shards) for weight in self.network.weights())
            self.allocate("optimizer", largest * _BF16_STEP_BYTES)
        del resident

    def _resident(self) -> list[Storage]:
        """Allocate the state that is on the device between steps."""
        if self.offload:
            return []
        weights = list(self.network.weights())
        num_local = num_elements(weights, self.num_shards)
        return [
            self.allocate("parameters", num_local * FP32),
            self.allocate("optimizer", moment_bytes(self.optimizer, self.network, weights, num_local)),
            self.allocate("ema", num_local * FP32 * self.num_averages),
        ]

    def before_forward(self, block: AnyBlock | None) -> None:
        if block is None:
            self.root.finish_gathering(forward=True)
            return
        number = self.numbers[block]
        self.groups[number].finish_gathering(forward=True)
        for ahead in self.groups[number + 1 : number + 1 + self.prefetch]:
            ahead.gather()

    def after_forward(self, block: AnyBlock | None) -> None:
        if block is None:
            self.last_buffer = None
        elif self.reshard:
            self.groups[self.numbers[block]].free()

    def before_backward(self, block: AnyBlock | None) -> None:
        number = len(self.groups) if block is None else self.numbers[block]
        if block is not None:
            self.groups[number].finish_gathering(forward=False)
        # FSDP2 by default gathers one group ahead.
        ahead = 1 if block is None else max(self.prefetch, 1)
        for group in self.groups[max(number - ahead, 0) : number][::-1]:
            group.gather()

    def after_backward(self, block: AnyBlock | None) -> None:
        group = self.root if block is None else self.groups[self.numbers[block]]
        group.free()
        group.reduce()
        if block is None:
            self.last_reduction = None
