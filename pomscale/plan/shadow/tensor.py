"""Tensors without values, and automatic differentiation over them, which allocate, keep and free as torch does.

A network written with `shadow.operators` runs here with sizes alone. Storages die with their last reference, in the
order in which torch's die, so the ledger's peak is that of the real step. The rules are torch's:

- an operator keeps for its backward pass what its formula needs, and gives it up once it has run (saved variables);
- the backward pass runs operators in the reverse order of their making, gradients of leaves at once;
- a tensor used twice gets a new tensor for the sum of its gradients;
- a checkpointed function keeps its inputs. When the first of its saved tensors is asked for it runs again, up to the
  last of them, and holds them until each has been used (torch.utils.checkpoint, not reentrant).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pomscale.plan.shadow.ledger import Ledger, Part, Storage

Shape: TypeAlias = tuple[int, ...]


class Tape:
    """One process: its ledger, and the order of its operators. `itemsize` is the bytes of an activation's element."""

    def __init__(self, itemsize: int) -> None:
        self.ledger = Ledger()
        self.itemsize = itemsize
        self.num_nodes = 0
        self.frame: Frame | None = None

    @property
    def runs_again(self) -> bool:
        """Whether a checkpointed function runs again whose matrix products were kept, and do not run again."""
        return self.frame is not None and self.frame.recomputed is not None and self.frame.products is not None

    def new(self, shape: Shape, itemsize: int | None = None, part: Part = "activations") -> Tensor:
        itemsize = self.itemsize if itemsize is None else itemsize
        return Tensor(self, shape, itemsize, Storage(self.ledger, part, math.prod(shape) * itemsize))


class Tensor:
    """A shape, bytes per element and a storage; `node` made it, as its output number `index`."""

    __slots__ = ("index", "itemsize", "node", "shape", "storage", "tape")

    def __init__(
        self, tape: Tape, shape: Shape, itemsize: int, storage: Storage, node: Node | Leaf | None = None, index: int = 0
    ) -> None:
        self.tape, self.shape, self.itemsize, self.storage = tape, shape, itemsize, storage
        self.node, self.index = node, index

    def detached(self) -> Tensor:
        """Return a tensor over the same storage that no operator made."""
        return Tensor(self.tape, self.shape, self.itemsize, self.storage)

    def __add__(self, other: Tensor | int) -> Tensor:
        return add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Tensor) -> Tensor:
        return add(self, other)

    def __mul__(self, other: Tensor) -> Tensor:
        return multiply(self, other)


class Leaf:
    """Accumulator of a gradient: the first one is taken over, later ones are added to it in place."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def accumulate(self, gradient: Tensor) -> None:
        if self.gradient is None:
            gradient.storage.becomes("gradients")
            self.gradient = gradient


Backward: TypeAlias = Callable[[Sequence["Tensor | None"], Sequence[Tensor]], Sequence["Tensor | None"]]
"""Backward pass: (gradients of the outputs, saved tensors) -> gradients of the inputs, None where none is needed."""


class Node:
    """An operator that has run."""

    __slots__ = ("backward", "edges", "gradients", "number", "saved")

    def __init__(
        self, tape: Tape, inputs: Sequence[Tensor], saved: Sequence[Tensor], num_outputs: int, backward: Backward
    ) -> None:
        tape.num_nodes += 1
        self.number = tape.num_nodes
        self.edges = [(tensor.node, tensor.index) for tensor in inputs]
        self.saved = [_save(tape, tensor) for tensor in saved]
        self.gradients: list[Tensor | None] = [None] * num_outputs
        self.backward = backward


def record(inputs: Sequence[Tensor], outputs: Sequence[Tensor], saved: Sequence[Tensor], backward: Backward) -> None:
    """Make `outputs` differentiable functions of `inputs`, if any of these is one."""
    if all(tensor.node is None for tensor in inputs):
        return
    node = Node(outputs[0].tape, inputs, saved, len(outputs), backward)
    for index, output in enumerate(outputs):
        output.node, output.index = node, index


def backward(output: Tensor) -> None:
    """Propagate the gradient of `output`, of its own size, to the leaves."""
    assert isinstance(output.node, Node)
    output.node.gradients[output.index] = output.tape.new(output.shape, output.itemsize)
    ready = [(-output.node.number, output.node)]
    waiting = {output.node}
    del output
    while ready:
        node = heapq.heappop(ready)[1]
        waiting.discard(node)
        found = node.backward(_taken(node.gradients), [_load(saved) for saved in node.saved])
        node.saved = []
        for (source, index), gradient in zip(node.edges, found, strict=True):
            if source is None or gradient is None:
                continue
            if isinstance(source, Leaf):
                source.accumulate(gradient)
                continue
            _accumulate(source.gradients, index, gradient)
            if source not in waiting:
                waiting.add(source)
                heapq.heappush(ready, (-source.number, source))
        node.edges = []
        del found, node
        gradient = source = None


def _taken(gradients: list[Tensor | None]) -> list[Tensor | None]:
    taken = gradients.copy()
    gradients.clear()
    return taken


def _accumulate(gradients: list[Tensor | None], index: int, gradient: Tensor) -> None:
    so_far = gradients[index]
    gradients[index] = gradient if so_far is None else gradient.tape.new(gradient.shape, gradient.itemsize)


# --- checkpointing ---------------------------------------------------------------------------------------------------


class Frame:
    """One call of a checkpointed function. `products` has the outputs of matrix products, if these are kept."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], keep_products: bool) -> None:
        self.function = function
        self.inputs = list(inputs)
        self.num_saved = 0
        self.recomputed: dict[int, Tensor] | None = None
        self.products: list[Tensor] | None = [] if keep_products else None

    def load(self, number: int) -> Tensor:
        """Return the saved tensor of this number, and drop it."""
        if self.recomputed is None:
            self._recompute()
        assert self.recomputed is not None
        return self.recomputed.pop(number)

    def _recompute(self) -> None:
        self.recomputed = {}
        tape = self.inputs[0].tape
        inputs = [tensor.detached() for tensor in self.inputs]
        for tensor in inputs:
            tensor.node = Leaf()  # as the first time, everything that follows is differentiable
        outer, tape.frame = tape.frame, self
        try:
            self.function(*inputs)
        except _AllRecomputed:
            pass
        finally:
            tape.frame = outer
        self.inputs = []


class _AllRecomputed(Exception):
    """Signal that the rest of the function is not needed."""


_Saved: TypeAlias = "Tensor | tuple[Frame, int]"


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor, keep_products: bool) -> Tensor:
    """Return function(*inputs), to be run again in the backward pass."""
    tape = inputs[0].tape
    outer, tape.frame = tape.frame, Frame(function, inputs, keep_products)
    try:
        return function(*inputs)
    finally:
        tape.frame = outer


def product(tape: Tape, shape: Shape, itemsize: int | None = None) -> Tensor:
    """Allocate the output of a matrix product or of fused attention."""
    frame = tape.frame
    if frame is None or frame.products is None:
        return tape.new(shape, itemsize)
    if frame.recomputed is not None:
        return frame.products.pop(0).detached()
    made = tape.new(shape, itemsize)
    frame.products.append(made.detached())
    return made


def _save(tape: Tape, tensor: Tensor) -> _Saved:
    frame = tape.frame
    if frame is None:
        return tensor.detached()
    if frame.recomputed is None:
        frame.num_saved += 1
        return frame, frame.num_saved - 1
    number = len(frame.recomputed)
    frame.recomputed[number] = tensor.detached()
    if number + 1 == frame.num_saved:
        raise _AllRecomputed
    return frame, number


def _load(saved: _Saved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved[0].load(saved[1])


# --- the two operators with signs of their own -----------------------------------------------------------------------


def broadcast(a: Shape, b: Shape) -> Shape:
    """Return the shape of an elementwise operation."""
    longest = max(len(a), len(b))
    padded = [(1,) * (longest - len(shape)) + shape for shape in (a, b)]
    return tuple(max(pair) for pair in zip(*padded, strict=True))


def _sum_to(gradient: Tensor, shape: Shape) -> Tensor:
    """Return the gradient of an operand that was broadcast."""
    return gradient if gradient.shape == shape else gradient.tape.new(shape, gradient.itemsize)


def add(a: Tensor, b: Tensor | int) -> Tensor:
    if isinstance(b, int):
        result = a.tape.new(a.shape, a.itemsize)
        record([a], [result], [], lambda gradients, _: gradients)
        return result
    result = a.tape.new(broadcast(a.shape, b.shape), max(a.itemsize, b.itemsize))
    shapes = (a.shape, b.shape)

    def backward(gradients: Sequence[Tensor | None], _: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        return [_sum_to(gradient, shape) for shape in shapes]

    record([a, b], [result], [], backward)
    return result


def multiply(a: Tensor, b: Tensor) -> Tensor:
    result = a.tape.new(broadcast(a.shape, b.shape), max(a.itemsize, b.itemsize))
    needs = (a.node is not None, b.node is not None)
    shapes = (a.shape, b.shape)

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        # Both products exist before either is summed to its shape.
        whole = [gradient.tape.new(gradient.shape, gradient.itemsize) if needed else None for needed in needs]
        return [None if w is None else _sum_to(w, shape) for w, shape in zip(whole, shapes, strict=True)]

    record([a, b], [result], [x for x, other in ((b, needs[0]), (a, needs[1])) if other], backward)
    return result
