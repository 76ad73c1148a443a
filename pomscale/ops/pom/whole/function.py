"""The whole mixer as one operator of torch.library, with its gradients, shapes and FLOPs.

The operator takes lists of tensors and of numbers, which is what a schema can say; `mix` is its public form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pomscale.ops.pom.form import Form
from pomscale.ops.pom.masks import BlockCausal, Mask, Segments, check_mask
from pomscale.ops.pom.rotary import check_positions
from pomscale.ops.pom.state import accumulation_dtype
from pomscale.ops.pom.whole import backward as backward_pass
from pomscale.ops.pom.whole import forward as forward_pass
from pomscale.ops.pom.whole.layout import ORDERS, Layout, num_chunks
from pomscale.ops.pom.whole.operands import Call, Memory, Weights

T = TypeVar("T")

# Positions in the operator's list `form`: name, degree, heads, rope, then which tensors are there.
OF_WEIGHTS, OF_INDICES = slice(4, 11), slice(11, 14)


def mix(
    x: Tensor,
    context: Tensor | None,
    weights: Weights,
    form: Form,
    mask: Mask,
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
    *,
    memory: Memory = "fast",
) -> Tensor:
    """Let x (b m d) read context (b n d_context), by default x itself -> (b m d_out).

    The result is that of the linear maps of `weights` around `polynomial_mixer`. What is kept for the backward pass is
    the inputs, one vector per state and, with memory "fast", u and the gates. Beside these nothing is of the size of
    u, in either pass: tokens pass in chunks through buffers that are used again.

    Args:
        x: Queries, of the dtype of the weights; sums run in fp32 (float64 for float64).
        context: Tokens that are read, or None.
        weights: Weights of the linear maps.
        form: Polynomial and gates.
        mask: None, "causal", BlockCausal, Segments or bool (b n); patterns (b m n) are not served.
        positions: (m axes) or (b m axes) integers, with rope alone.
        context_positions: (n axes) or (b n axes) integers; in a self mixer by default `positions`.
        memory: What is kept; "lean" runs the projection and the gate's map again in the backward pass.

    Raises:
        ValueError: The operands do not fit together.
    """
    if context is None and context_positions is not None:
        context = x
    num_context = _check(x, context, weights, form, mask)
    check_positions("positions", positions, form.rope, x.shape[0], x.shape[1])
    if context is not None:
        check_positions("context positions", context_positions, form.rope, x.shape[0], num_context)
    takes_part = mask if isinstance(mask, Tensor) else None
    inner = mask.inner if isinstance(mask, Segments) else mask
    order, segments = [0, 0], [x.shape[1], num_context]
    if isinstance(inner, BlockCausal) and inner.frame_length > 1:
        order = [2, inner.frame_length]
    elif inner is not None and not isinstance(inner, Tensor):  # causal, or frames of one token
        order = [1, 0]
    if isinstance(mask, Segments):
        segments = [*mask.lengths, *mask.of_context]
    tensors = weights.tensors()
    is_trained = any(tensor is not None and tensor.requires_grad for tensor in (x, context, *tensors))
    # Without a backward pass nothing is kept, whatever the mode.
    keep = memory == "fast" and is_trained and torch.is_grad_enabled()
    indices = [takes_part, positions, context_positions]
    numbers = [int(form.name != "product"), form.degree, form.heads, form.rope or 0]
    numbers += [int(tensor is not None) for tensor in (*tensors, *indices)]
    return _mix(x, context, _present(tensors), _present(indices), numbers, order, segments, keep)[0]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Leave out what is None: torch 2.13 tracks no gradients through a list of tensors that holds a None."""
    return [tensor for tensor in tensors if tensor is not None]


def restored(present: Sequence[T], is_present: Sequence[int]) -> list[T | None]:
    """Return the list that `_present` was given, or the same of what belongs to its tensors."""
    remaining = iter(present)
    return [next(remaining) if is_there else None for is_there in is_present]


def _check(x: Tensor, context: Tensor | None, weights: Weights, form: Form, mask: Mask) -> int:
    """Raise ValueError unless the operands fit together; return the number of context tokens."""
    source = x if context is None else context
    if x.dim() != 3 or source.dim() != 3 or x.shape[0] != source.shape[0]:
        raise ValueError(f"expected x (b m d) and context (b n d), got {tuple(x.shape)} and {tuple(source.shape)}")
    if isinstance(mask, Tensor) and mask.dim() == 3:
        raise ValueError("mask: patterns (b m n) are served by polynomial_mixer alone")
    check_mask(mask, x.shape[0], x.shape[1], source.shape[1])
    num_features = form.num_features(weights.projection.shape[0])
    coefficients = None if form.name == "product" else (num_features, form.degree)
    shapes = {
        "projection": (num_features, source.shape[2]),
        "gate": (form.num_gates(num_features), x.shape[2]),
        "output": (weights.output.shape[0], num_features),
        "coefficients": coefficients,
    }
    for name, shape in shapes.items():
        weight = getattr(weights, name)
        got = None if weight is None else tuple(weight.shape)
        if got != shape:
            raise ValueError(f"{name}: expected a weight of shape {shape}, got {got}")
    return source.shape[1]


def _call(
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    form: Sequence[int],
    order: Sequence[int],
    segments: Sequence[int],
) -> Call:
    layout = layout_of(x.shape, None if context is None else context.shape, order, segments)
    takes_part, positions, context_positions = restored(indices, form[OF_INDICES])
    flat = x.reshape(-1, x.shape[2])
    read = flat if context is None else context.reshape(-1, context.shape[2])
    positions = _flat_positions(positions, layout.batch)
    return Call(
        flat,
        read,
        Weights(*restored(weights, form[OF_WEIGHTS])),  # type: ignore[arg-type]  # `_check` knows which may be None
        Form("coefficients" if form[0] else "product", form[1], form[2], form[3] or None),  # type: ignore[arg-type]
        layout,
        None if takes_part is None else takes_part.reshape(-1),
        positions,
        positions if context is None else _flat_positions(context_positions, layout.batch),
    )


def layout_of(x: Sequence[int], context: Sequence[int] | None, order: Sequence[int], segments: Sequence[int]) -> Layout:
    """Return the layout of tokens of these shapes, (b m d) and (b n d)."""
    half = len(segments) // 2
    pairs = list(zip(segments[:half], segments[half:], strict=True))
    return Layout(x[0], x[1], (x if context is None else context)[1], ORDERS[order[0]], order[1], pairs)


def _flat_positions(positions: Tensor | None, batch: int) -> Tensor | None:
    if positions is None:
        return None
    if positions.dim() == 2:
        positions = positions.expand(batch, *positions.shape)
    return positions.reshape(-1, positions.shape[-1])


@torch.library.custom_op("pomscale::mix", mutates_args=())
def _mix(
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    form: Sequence[int],
    order: Sequence[int],
    segments: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix -> y, u and gate (empty unless kept), states."""
    y, u, gate, states = forward_pass.forward(_call(x, context, weights, indices, form, order, segments), keep)
    return y.view(x.shape[0], x.shape[1], y.shape[1]), u, gate, states


@torch.library.custom_op("pomscale::mix_backward", mutates_args=())
def _mix_backward(
    dy: Tensor,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    indices: Sequence[Tensor],
    form: Sequence[int],
    order: Sequence[int],
    segments: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Differentiate -> gradients of tensors, in their order; empty where not needed.

    tensors: x, context unless it is x, and the weights. kept: u and gate or empty tensors, and states.
    """
    num_inputs = len(tensors) - sum(form[OF_WEIGHTS])
    x, context = tensors[0], tensors[1] if num_inputs == 2 else None
    call = _call(x, context, tensors[num_inputs:], indices, form, order, segments)
    u, gate, states = kept
    pre_activations = (u, gate) if u.dim() == 2 else None
    flags = restored(needed[num_inputs:], form[OF_WEIGHTS])
    wanted = [needed[0], num_inputs == 2 and needed[1], *(bool(flag) for flag in flags)]
    found = backward_pass.backward(call, dy.reshape(-1, dy.shape[2]), pre_activations, states, wanted)
    is_there = [True, num_inputs == 2, *form[OF_WEIGHTS]]
    found = [gradient for gradient, there in zip(found, is_there, strict=True) if there]
    return [
        dy.new_empty(0) if gradient is None else gradient.view(tensor.shape)
        for gradient, tensor in zip(found, tensors, strict=True)
    ]


@_mix.register_fake
def _(
    x: Tensor, context: Tensor | None, weights: Any, _i: Any, form: Any, order: Any, segments: Any, keep: bool
) -> Any:
    layout = layout_of(x.shape, None if context is None else context.shape, order, segments)
    of = Weights(*restored(weights, form[OF_WEIGHTS]))  # type: ignore[arg-type]
    rows, read = x.shape[0] * x.shape[1], x.shape[0] * layout.num_context
    y = x.new_empty(x.shape[0], x.shape[1], of.output.shape[0])
    kept = [
        x.new_empty(num_rows, weight.shape[0]) if keep else x.new_empty(0)
        for num_rows, weight in ((read, of.projection), (rows, of.gate))
    ]
    num_states = num_chunks(rows) if layout.order == "causal" else layout.num_states
    return y, *kept, x.new_empty(num_states, of.output.shape[1], dtype=accumulation_dtype(x.dtype))


@_mix_backward.register_fake
def _(dy: Tensor, tensors: Any, _k: Any, _i: Any, _f: Any, _o: Any, _s: Any, needed: Sequence[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if wanted else dy.new_empty(0)
        for tensor, wanted in zip(tensors, needed, strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, context, weights, indices, form, order, segments, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, context, *weights, *indices, *kept)
    ctx.numbers, ctx.num_weights, ctx.num_indices = (form, order, segments), len(weights), len(indices)
    ctx.set_materialize_grads(False)  # u, gate and states have no gradients of their own


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    no_weights, no_indices = [None] * ctx.num_weights, [None] * ctx.num_indices
    if dy is None:
        return None, None, no_weights, no_indices, None, None, None, None
    x, context, *others = ctx.saved_tensors
    weights, indices, kept = others[: ctx.num_weights], others[ctx.num_weights : -3], others[-3:]
    of_x, of_context, of_weights = ctx.needs_input_grad[:3]
    inputs, needed = ([x], [of_x]) if context is None else ([x, context], [of_x, of_context])
    needed += of_weights
    found = _mix_backward(dy, [*inputs, *weights], kept, indices, *ctx.numbers, needed)
    gradients = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
    of_context = gradients[1] if len(inputs) == 2 else None
    return gradients[0], of_context, gradients[len(inputs) :], no_indices, None, None, None, None


_mix.register_autograd(_backward, setup_context=_setup_context)
