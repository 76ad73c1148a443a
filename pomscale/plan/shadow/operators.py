"""Operators of torch for `shadow.tensor`: what they allocate, keep for the backward pass, and allocate there.

Each is written after the operator's line in torch's derivatives.yaml. Vectors of a few numbers per sample (counts,
positions) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pomscale.plan.shadow.ledger import Storage
from pomscale.plan.shadow.tensor import Leaf, Shape, Tape, Tensor, broadcast, product, record

INT64, FP32, BF16, FP16, BOOL = 8, 4, 2, 2, 1


class Weight:
    """A parameter. Operators read `tensor`, which an engine may replace when it gathers or frees the weight.

    num_matrices: maps that the rows of a linear map's weight stack (`stacked_maps` of the real module); 0 for others.
    """

    def __init__(self, shape: Shape, num_matrices: int = 0) -> None:
        self.shape, self.num_matrices = shape, num_matrices
        self.leaf = Leaf()
        self.tensor: Tensor | None = None

    def read(self) -> Tensor:
        """Return the weight without its bytes: what is kept for the backward pass is what the engine gathers then."""
        assert self.tensor is not None, "the engine has not gathered this weight"
        tape = self.tensor.tape
        return Tensor(tape, self.shape, self.tensor.itemsize, Storage(tape.ledger, "parameters", 0), self.leaf)


def linear(x: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
    """Map x (.. i) by weight (o i) and bias (o), if there is one -> (.. o)."""
    weights = [weight.read(), *([] if bias is None else [bias.read()])]
    result = product(x.tape, (*x.shape[:-1], weight.shape[0]))
    needs_input, shape = x.node is not None, x.shape
    sizes = [(w.shape, w.itemsize) for w in weights]

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        tape = saved[0].tape
        return [tape.new(shape) if needs_input else None, *(tape.new(*size) for size in sizes)]

    record([x, *weights], [result], [x], backward)
    return result


def contracted(expanded: Tensor, weight: Weight, bias: Weight) -> Tensor:
    """Mirror layers/mlp.py: map silu(a) o b of expanded [a b] (.. 2 i) -> (.. o); keeps [a b]."""
    w, b, tape = weight.read(), bias.read(), expanded.tape
    hidden = (*expanded.shape[:-1], w.shape[1])
    temporary = tape.new(hidden)
    result = product(tape, (*hidden[:-1], w.shape[0]))
    del temporary
    shape, sizes = expanded.shape, [(each.shape, each.itemsize) for each in (w, b)]

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        recomputed, of_expanded = tape.new(hidden), tape.new(shape)
        temporary = [tape.new(hidden) for _ in range(2)]
        del temporary
        of_weights = [tape.new(*size) for size in sizes]
        del recomputed
        return [of_expanded, *of_weights]

    record([expanded, w, b], [result], [expanded], backward)
    return result


def grouped_linear(x: Tensor, weight: Weight, groups: int) -> Tensor:
    """Map x (b n i) by weight (o i/groups) group by group -> (b n o): a product in another order, and its copy."""
    w, shape = weight.read(), x.shape
    in_groups = product(x.tape, (groups, shape[0] * shape[1], w.shape[0] // groups))
    result = x.tape.new((*shape[:-1], w.shape[0]))
    del in_groups
    w_shape, w_itemsize = w.shape, w.itemsize

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        tape = saved[0].tape
        of_input, of_weight = tape.new(shape), tape.new(w_shape, w_itemsize)
        copy = tape.new(w_shape, w_itemsize)
        del of_weight
        return [tape.new(of_input.shape), copy]

    record([x, w], [result], [x], backward)
    return result


def matrix_product(a: Tensor, b: Tensor, shape: Shape) -> Tensor:
    """Multiply batches of matrices -> a tensor of this shape."""
    result = product(a.tape, shape)

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        return [tensor.tape.new(tensor.shape, tensor.itemsize) for tensor in saved]

    record([a, b], [result], [a, b], backward)
    return result


def convolution(x: Tensor, weight: Weight, bias: Weight, positions: int) -> Tensor:
    """Map the patches of x (b ..) -> (b, positions, o); the gradient of x is not needed."""
    w, b = weight.read(), bias.read()
    result = product(x.tape, (x.shape[0], positions, w.shape[0]))
    w_shape, w_itemsize = w.shape, w.itemsize

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        tape = saved[0].tape
        return [None, tape.new(w_shape, w_itemsize), tape.new(w_shape[:1], w_itemsize)]

    record([x, w, b], [result], [x], backward)
    return result


def embedding(weight: Weight, batch: int) -> Tensor:
    """Look up a row of weight (n d) for each sample -> (b d). The gradient is dense."""
    w = weight.read()
    result = w.tape.new((batch, w.shape[1]))
    shape, itemsize, tape = w.shape, w.itemsize, w.tape
    record([w], [result], [], lambda gradients, saved: [tape.new(shape, itemsize)])
    return result


def activation(x: Tensor) -> Tensor:
    """Apply GELU, SiLU, a square, a leaky ReLU or a hard sigmoid: elementwise, differentiated from the input."""
    result = x.tape.new(x.shape, x.itemsize)
    record([x], [result], [x], lambda gradients, saved: [saved[0].tape.new(saved[0].shape, saved[0].itemsize)])
    return result


def sigmoid(x: Tensor) -> Tensor:
    """Apply a sigmoid, which is differentiated from the output."""
    result = x.tape.new(x.shape, x.itemsize)
    record([x], [result], [result], lambda gradients, saved: [saved[0].tape.new(saved[0].shape, saved[0].itemsize)])
    return result


def layer_norm(x: Tensor) -> Tensor:
    """Normalise without weights; keeps the input, and mean and deviation of each token in fp32."""
    result = x.tape.new(x.shape, x.itemsize)
    rows = (*x.shape[:-1], 1)
    statistics = [x.tape.new(rows, FP32), x.tape.new(rows, FP32)]
    record(
        [x],
        [result],
        [x, *statistics],
        lambda gradients, saved: [saved[0].tape.new(saved[0].shape, saved[0].itemsize)],
    )
    return result


def rms_norm(x: Tensor, weight: Weight) -> Tensor:
    """Mirror layers/norm.py: keeps the input, and a scale of each vector in fp32; works in fp32 on chunks."""
    w, tape, is_cast = weight.read(), x.tape, x.itemsize != FP32
    result, scales = tape.new(x.shape, x.itemsize), tape.new((*x.shape[:-1], 1), FP32)
    chunk = min(math.prod(x.shape), _RMS_NORM_CHUNK)
    temporary = tape.new((1 + is_cast, chunk), FP32)
    del temporary
    shape, itemsize, w_shape, w_itemsize = x.shape, x.itemsize, w.shape, w.itemsize

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        of_input = tape.new(shape, itemsize)
        temporary = tape.new((3 + is_cast, chunk), FP32)
        del temporary
        return [of_input, tape.new(w_shape, w_itemsize)]

    record([x, w], [result], [x, scales], backward)
    return result


_RMS_NORM_CHUNK = 2**18


def dropout(x: Tensor) -> Tensor:
    """Mirror layers/dropout.py: a division, and a fill by a mask that is kept.

    The hash is an int32 tensor; while it is mixed there are another and an index of the numbers of a sample.
    """
    index, hashed, shifted = (x.tape.new(shape, 4) for shape in (x.shape[1:], x.shape, x.shape))
    del index, shifted
    mask = x.tape.new(x.shape, BOOL)
    del hashed
    divided = scaled(x)
    result = x.tape.new(x.shape, x.itemsize)
    shape, itemsize, tape = x.shape, x.itemsize, x.tape
    record([divided], [result], [mask], lambda gradients, saved: [tape.new(shape, itemsize)])
    return result


def clamp(x: Tensor) -> Tensor:
    """Clamp x, which is differentiated from the input, by a mask of two comparisons."""
    result = x.tape.new(x.shape, x.itemsize)

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        (before,) = saved
        comparisons = [before.tape.new(before.shape, BOOL) for _ in range(2)]
        gradient = before.tape.new(before.shape, before.itemsize)
        del comparisons
        return [gradient]

    record([x], [result], [x], backward)
    return result


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Subtract b from a, of one shape; the gradient of b is a copy with the other sign."""
    result = a.tape.new(a.shape, a.itemsize)

    def backward(gradients: Sequence[Tensor | None], _: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        return [gradient, gradient.tape.new(gradient.shape, gradient.itemsize)]

    record([a, b], [result], [], backward)
    return result


def part(x: Tensor, width: int) -> Tensor:
    """View `width` of the channels of x (.. d); the gradient is as wide as x, with zeros around it."""
    result = Tensor(x.tape, (*x.shape[:-1], width), x.itemsize, x.storage)
    shape, itemsize, tape = x.shape, x.itemsize, x.tape
    record([x], [result], [], lambda gradients, saved: [tape.new(shape, itemsize)])
    return result


def unbind(weight: Weight) -> list[Tensor]:
    """Return the columns of weight (n k) as k views (n,); their gradients are stacked."""
    w = weight.read()
    columns = [Tensor(w.tape, w.shape[:1], w.itemsize, w.storage) for _ in range(w.shape[1])]
    shape, itemsize, tape = w.shape, w.itemsize, w.tape
    record([w], columns, [], lambda gradients, saved: [tape.new(shape, itemsize)])
    return columns


def chunk(x: Tensor, pieces: int) -> list[Tensor]:
    """Cut x into views along its last axis; their gradients are joined."""
    shape = (*x.shape[:-1], x.shape[-1] // pieces)
    views = [Tensor(x.tape, shape, x.itemsize, x.storage) for _ in range(pieces)]
    whole, itemsize, tape = x.shape, x.itemsize, x.tape
    record([x], views, [], lambda gradients, saved: [tape.new(whole, itemsize)])
    return views


def concatenate(pieces: Sequence[Tensor]) -> Tensor:
    """Join pieces along the last axis; their gradients are views."""
    first = pieces[0]
    return _joined(pieces, (*first.shape[:-1], sum(piece.shape[-1] for piece in pieces)))


def concatenate_tokens(pieces: Sequence[Tensor]) -> Tensor:
    """Join pieces (b n d) along their tokens; their gradients are views."""
    batch, _, dim = pieces[0].shape
    return _joined(pieces, (batch, sum(piece.shape[1] for piece in pieces), dim))


def last_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """View the last tokens of x (b n d); the gradient is as long as x, with zeros before it."""
    result = Tensor(x.tape, (x.shape[0], num_tokens, x.shape[2]), x.itemsize, x.storage)
    shape, itemsize, tape = x.shape, x.itemsize, x.tape
    record([x], [result], [], lambda gradients, saved: [tape.new(shape, itemsize)])
    return result


def _joined(pieces: Sequence[Tensor], shape: Shape) -> Tensor:
    first, shapes = pieces[0], [piece.shape for piece in pieces]
    result = first.tape.new(shape, first.itemsize)

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        return [Tensor(gradient.tape, shape, gradient.itemsize, gradient.storage) for shape in shapes]

    record(pieces, [result], [], backward)
    return result


def sum_tokens(x: Tensor) -> Tensor:
    """Sum x (.. n d) -> (.. 1 d) fp32. The gradient is a broadcast view, which becomes a tensor when it is cast."""
    result = x.tape.new((*x.shape[:-2], 1, x.shape[-1]), FP32)
    shape, itemsize = x.shape, x.itemsize

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        if itemsize != FP32:
            return [gradient.tape.new(shape, itemsize)]
        return [Tensor(gradient.tape, shape, FP32, gradient.storage)]

    record([x], [result], [], backward)
    return result


def view(x: Tensor, *shape: int) -> Tensor:
    """View x in another shape. The gradient is a view too, unless it was broadcast and is copied."""
    result = Tensor(x.tape, shape, x.itemsize, x.storage)
    before = x.shape

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        (gradient,) = gradients
        assert gradient is not None
        if math.prod(before) * gradient.itemsize > gradient.storage.num_bytes:
            return [gradient.tape.new(before, gradient.itemsize)]
        return [Tensor(gradient.tape, before, gradient.itemsize, gradient.storage)]

    record([x], [result], [], backward)
    return result


def cast(x: Tensor, itemsize: int) -> Tensor:
    """Copy x in another precision; x itself if it has that one."""
    if x.itemsize == itemsize:
        return x
    result = x.tape.new(x.shape, itemsize)
    shape, before, tape = x.shape, x.itemsize, x.tape
    record([x], [result], [], lambda gradients, saved: [tape.new(shape, before)])
    return result


def scaled(x: Tensor) -> Tensor:
    """Copy x: multiplied or divided by a number without gradient, or reordered."""
    result = x.tape.new(x.shape, x.itemsize)
    shape, itemsize, tape = x.shape, x.itemsize, x.tape
    record([x], [result], [], lambda gradients, saved: [tape.new(shape, itemsize)])
    return result


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, readable: Tensor | None = None) -> Tensor:
    """Apply fused attention: queries (b m d), key and value (b n d) -> (b m d).

    Keeps operands, output and a log-sum-exp per head and query. A mask `readable` (b 1 m n) bool is kept as numbers to
    add; without one nothing is m x n.
    """
    tape, (batch, num_queries, _) = query.tape, query.shape
    added = [] if readable is None else [_numbers_of(readable)]
    # This is one operator with two outputs: where one is kept, so is the other.
    result = product(tape, query.shape)
    normalizer = product(tape, (batch, num_queries, num_heads), FP32)
    record(
        [query, key, value],
        [result],
        [query, key, value, result, normalizer, *added],
        lambda gradients, saved: [tape.new(tensor.shape) for tensor in saved[:3]],
    )
    return result


def whole_mixer(
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Weight],
    widths: tuple[int, int, int],
    num_states: int,
    *,
    keep: bool,
    masked: bool,
    block_rows: int,
) -> Tensor:
    """Apply the mixer of ops/pom/whole: queries x (b m d), context (b n d) or None for x itself -> (b m d).

    Keeps its inputs and the means of `num_states` states, and, if `keep`, u and the gates. weights: all of the mixer.
    widths: channels of u, gates and channels of the result. masked: the context has padding. block_rows: rows that the
    kernels in PyTorch (`whole.kernels`) process at a time in fp32; 0 for those in C++.
    """
    tape, read = x.tape, [weight.read() for weight in weights]
    (width, num_gates, d_out), source = widths, x if context is None else context
    rows, num_read = (math.prod(tensor.shape[:-1]) for tensor in (x, source))
    y = product(tape, (*x.shape[:-1], d_out))
    kept = [product(tape, (num_read, width)), product(tape, (rows, num_gates))] if keep else []
    means = product(tape, (num_states, width), FP32)
    # Where heads share a gate, the output map is folded into the states, unless each query has one of its own.
    folds = num_gates < width and rows > num_states
    longest = max(_chunk_rows(rows), _chunk_rows(num_read))
    if not tape.runs_again:
        _chunk_buffers(tape, _chunk_rows(rows) if keep else longest, width, source.shape[-1], masked)
        if folds:
            _folded_map(tape, num_states, widths)
    inputs, shapes = [x] if context is None else [x, context], [tensor.shape for tensor in read]
    needs, d_context = [tensor.node is not None for tensor in inputs], source.shape[-1]

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        of_inputs = saved[: len(needs)]
        sums = [tape.new(shape, FP32) for shape in shapes]
        found = [tape.new(t.shape) if needed else None for t, needed in zip(of_inputs, needs, strict=True)]
        if folds:
            recomputed = tape.new((0 if keep else longest, width))
            means = _folded_backward(tape, num_states, widths, rows)
            del recomputed
        else:
            means = tape.new((num_states, width), FP32)
            buffers = [tape.new((n, width)) for n in (_chunk_rows(rows), _chunk_rows(rows) if keep else longest)]
            # TorchKernels.select_backward has ten temporary tensors.
            buffers.append(tape.new((10 * min(block_rows, rows // num_states), num_gates), FP32))
            del buffers
        # TorchKernels.features_backward has four and a half, and seven in the form that has heads.
        block = (14 if folds else 9) * min(block_rows, num_read // num_states) // 2
        _chunk_buffers(tape, _chunk_rows(num_read) if keep else longest, width, d_context, masked, block)
        del means
        return [*found, *sums] if tape.itemsize == FP32 else [*found, *(tape.new(shape) for shape in shapes)]

    record([*inputs, *read], [y], [*inputs, *kept, means], backward)
    return y


def _chunk_buffers(tape: Tape, rows: int, width: int, d_context: int, masked: bool, block: int = 0) -> None:
    """Allocate and free what one chunk of `whole_mixer` needs.

    That is a buffer, tokens without those of the padding, and `block` rows of what kernels compute in fp32.
    """
    buffers = [tape.new((rows, width)), tape.new((rows, d_context) if masked else (0,)), tape.new((block, width), FP32)]
    del buffers


def _folded_map(tape: Tape, num_states: int, widths: tuple[int, int, int]) -> Tensor:
    """Mirror `folded_map` of ops/pom/whole/forward.py -> (states S d_out)."""
    width, heads, d_out = widths
    cast = tape.new((num_states, width)) if tape.itemsize != FP32 else None
    by_head = tape.new((heads, num_states, d_out))
    del cast
    folded = tape.new((num_states, heads, d_out)) if num_states > 1 else by_head
    del by_head
    return folded


def _folded_backward(tape: Tape, num_states: int, widths: tuple[int, int, int], rows: int) -> Tensor:
    """Mirror `_folded_queries` of ops/pom/whole/backward.py -> gradient of the means (states W)."""
    width, heads, d_out = widths
    folded = _folded_map(tape, num_states, widths)
    dfolded = tape.new((num_states, heads, d_out), FP32)
    # Held to the end: the gates of the last chunk, their gradient, and that of their logits.
    of_chunk = _chunk_rows(rows), heads
    gates = [tape.new(of_chunk), tape.new(of_chunk), tape.new(of_chunk, FP32)]
    output = tape.new((width, d_out), FP32) if tape.itemsize != FP32 else None
    by_head = tape.new((width, d_out), FP32)
    of_output = tape.new((width, d_out), FP32)
    del by_head, of_output
    by_head = tape.new((num_states, width), FP32)
    means = tape.new((num_states, width), FP32) if num_states > 1 else by_head
    del by_head, output, folded, dfolded, gates
    return means


def _chunk_rows(rows: int) -> int:
    """Mirror ops/pom/whole/layout.py: about equal chunks of at least 1024 rows."""
    return -(-rows // max(1, rows // 1024))


def _numbers_of(readable: Tensor) -> Tensor:
    """Make the numbers 0 and -inf of a mask, by way of its inverse."""
    opposite = readable.tape.new(readable.shape, BOOL)
    numbers = readable.tape.new(readable.shape)
    del opposite
    return numbers


def mean_squared(error: Tensor) -> Tensor:
    """Average the squares of error (b ..) fp32 -> a number; the gradient takes the size of the error twice."""
    squares = error.tape.new(error.shape, FP32)
    result = error.tape.new((1,), FP32)
    del squares

    def backward(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        first = saved[0].tape.new(saved[0].shape, FP32)
        second = first.tape.new(first.shape, FP32)
        return [second]

    record([error], [result], [error], backward)
    return result


def mean_cosine(projected: Tensor, features: Tensor) -> Tensor:
    """Mirror diffusion/alignment.py: projected (b n d) fp32, features (b n d) in fp16 -> a number.

    Keeps both as vectors in fp32, those of the features divided by their lengths. The gradient through the products is
    there before that through the lengths, and the directions are no longer.
    """
    tape, shape = projected.tape, projected.shape
    in_fp32 = tape.new(shape, FP32)
    directions = tape.new(shape, FP32)
    del in_fp32
    lengths, sums = tape.new(shape[:-1], FP32), tape.new(shape[:-1], FP32)
    result = tape.new((1,), FP32)

    def through_lengths(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        directions = tape.new(shape, FP32)
        gradient = tape.new(shape, FP32)
        del directions
        return [gradient]

    def through_products(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        return [tape.new(shape, FP32)]

    def of_numbers(gradients: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        return [tape.new(shape[:-1], FP32) for _ in range(2)]

    record([projected], [lengths], [projected, lengths], through_lengths)
    products = tape.new(shape, FP32)
    record([projected], [sums], [projected, directions], through_products)
    del products
    record([sums, lengths], [result], [sums, lengths], of_numbers)
    return result


__all__ = [
    "BF16", "BOOL", "FP16", "FP32", "INT64", "Weight", "activation", "attention", "broadcast", "cast", "chunk", "clamp",
    "concatenate", "concatenate_tokens", "contracted", "convolution", "difference", "dropout", "embedding",
    "grouped_linear", "last_tokens", "layer_norm", "linear", "matrix_product", "mean_cosine", "mean_squared", "part",
    "rms_norm", "scaled", "sigmoid", "sum_tokens", "unbind", "view", "whole_mixer",
]  # fmt: skip
