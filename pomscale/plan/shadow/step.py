"""Base of every engine's step: the weights of a network by group, and the loss of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pomscale.config.recomputation import is_recomputed
from pomscale.plan.shadow.ledger import Ledger
from pomscale.plan.shadow.network import AnyBlock, Network, loss
from pomscale.plan.shadow.operators import FP32, Weight
from pomscale.plan.shadow.tensor import Tape, Tensor, backward, checkpoint, record


class StepShadow:
    """Forward and backward pass of a micro-batch, with hooks for the engine wherever a group of weights is needed.

    A group is what an engine gathers and reduces together: each block, and the root, which is all the rest. Engines
    override the hooks, which stand here in the order of their calls.
    """

    def __init__(self, network: Network, itemsize: int, checkpointing: str) -> None:
        self.tape = Tape(itemsize)
        self.network = network
        self.checkpointing = checkpointing
        self.numbers: dict[AnyBlock, int] = {block: number for number, block in enumerate(self.network.blocks)}

    @property
    def ledger(self) -> Ledger:
        return self.tape.ledger

    def before_forward(self, block: AnyBlock | None) -> None:
        """Prepare the weights of `block` (None: of the root) to be read."""

    def after_forward(self, block: AnyBlock | None) -> None: ...

    def begin_backward(self) -> None:
        """Prepare for the backward pass, before that of the loss."""

    def before_backward(self, block: AnyBlock | None) -> None:
        """Prepare the weights of `block` (None: of the root), once the gradients of its outputs are there."""

    def after_backward(self, block: AnyBlock | None) -> None:
        """Take over the gradients of the group's weights, which are complete."""

    def micro_batch(self, size: int) -> None:
        """Run forward and backward of `size` samples."""
        tape = self.tape
        latents = tape.new((size, *self.network.latent_shape), FP32)
        tape.ledger.now = "forward"
        self.before_forward(None)
        features = self.network.features(tape, size)
        total = loss(self._predict, latents, features)
        del latents, features
        self.begin_backward()
        backward(total)
        self.after_backward(None)

    def _predict(self, noisy: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self.network(noisy, self._call)
        self.after_forward(None)
        hooked = _hooked([output for output in outputs if output is not None], lambda: self.before_backward(None))
        return hooked[0], hooked[1] if len(hooked) > 1 else None

    def _call(self, block: AnyBlock, *inputs: Tensor) -> Tensor:
        number = self.numbers[block]
        self.ledger.now = f"forward, block {number + 1}"
        self.before_forward(block)
        passed = _hooked(inputs, lambda: self.after_backward(block))
        keep_products = self.checkpointing == "selective"
        if keep_products or is_recomputed(self.checkpointing, number):
            y = checkpoint(block, *passed, keep_products=keep_products)
        else:
            y = block(*passed)
        self.after_forward(block)
        (y,) = _hooked([y], lambda: self._enter_backward(block, number))
        return y

    def _enter_backward(self, block: AnyBlock, number: int) -> None:
        self.ledger.now = f"backward, block {number + 1}"
        self.before_backward(block)


def _hooked(tensors: Sequence[Tensor], hook: Callable[[], None]) -> list[Tensor]:
    """Return the same tensors; `hook` runs once their gradients are there."""
    passed = [tensor.detached() for tensor in tensors]

    def backward(gradients: Sequence[Tensor | None], _: Sequence[Tensor]) -> Sequence[Tensor | None]:
        hook()
        return gradients

    record(tensors, passed, [], backward)
    return passed


def num_elements(weights: Sequence[Weight], num_shards: int = 1) -> int:
    """Return the elements of the largest shard, each weight being cut along its first axis."""
    return sum(-(-weight.shape[0] // num_shards) * math.prod(weight.shape[1:]) for weight in weights)
