"""Custom operators of the masks whose queries share states: sums of groups, and the selection from their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pomscale.ops.pom.triton_path import kernels
from pomscale.ops.pom.triton_path.launch import (
    Polynomial,
    angles,
    operand,
    run,
    running_sums,
    sum_of_items,
    turned,
)
from pomscale.ops.pom.triton_path.layout import Layout, group_lengths, grouped


def _of_features(
    u: Tensor, coefficients: Tensor | None, positions: Tensor | None, mask: Tensor | None
) -> dict[str, Any]:
    """Return the operands that `aggregate` and its gradient share."""
    return {
        **operand("u", u, u),
        "coefficients": u if coefficients is None else coefficients.t().contiguous(),
        **turned("positions", positions, u),
        "mask": u if mask is None else mask.contiguous().view(torch.uint8),
        "mask_batch": u.shape[1],
    }


@torch.library.custom_op("pomscale::pom_aggregate", mutates_args=())
def aggregate(
    u: Tensor,
    coefficients: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    degree: int,
    axes: int,
    lengths: Sequence[int],
    frame_length: int,
) -> Tensor:
    """Sum the features of each group, and of the groups before it in its segment -> (b groups W) fp32.

    Args:
        u: (b n W) pre-activations.
        coefficients: (W k), of the coefficient form alone.
        positions: (n axes) or (b n axes) integers, or None.
        mask: bool (b n), the tokens that take part, or None for all.
        degree: k.
        axes: Axes of the rotation, 0 for none.
        lengths: Tokens of each segment; empty = one segment of all.
        frame_length: Tokens of each group of a segment, 0 = the segment is one group.
    """
    polynomial = Polynomial(u.shape[2], degree, coefficients is None, axes)
    layout = grouped(lengths or [u.shape[1]], frame_length, u.device)
    partials = item_sums(u, coefficients, positions, mask, polynomial, layout)
    sums = sum_of_items(partials, layout)
    return running_sums(sums, layout)[0] if frame_length else sums


def item_sums(
    u: Tensor,
    coefficients: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    polynomial: Polynomial,
    layout: Layout,
) -> Tensor:
    """Return the sum of the features of each item (b items W) fp32; operands are as of `aggregate`."""
    block = polynomial.aggregation_block(u.dtype)
    partials = u.new_empty(u.shape[0], layout.num_items, u.shape[2], dtype=torch.float32)
    run(
        kernels.aggregate,
        u.shape[0] * layout.num_items * polynomial.tiles(block),
        **_of_features(u, coefficients, positions, mask),
        frequencies=angles(polynomial, u),
        items=layout.items,
        partials=partials,
        num_items=layout.num_items,
        **polynomial.arguments(block, DEGREE=polynomial.degree, MASKED=mask is not None),
        **polynomial.aggregation_options(u.dtype),
    )
    return partials


@aggregate.register_fake
def _(u, coefficients, positions, mask, degree, axes, lengths, frame_length):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape[0], num_groups(u.shape[1], lengths, frame_length), u.shape[2], dtype=torch.float32)


def num_groups(num_tokens: int, lengths: Sequence[int], frame_length: int) -> int:
    """Return the number of groups; num_tokens may be symbolic where there are no segments."""
    if lengths:
        return sum(len(groups) for groups in group_lengths(lengths, frame_length))
    return -(-num_tokens // frame_length) if frame_length else 1


@torch.library.custom_op("pomscale::pom_aggregate_backward", mutates_args=())
def aggregate_backward(
    dsums: Tensor,
    u: Tensor,
    coefficients: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    degree: int,
    axes: int,
    lengths: Sequence[int],
    frame_length: int,
) -> tuple[Tensor, Tensor]:
    """Return du (b n W) and dc (W k) (nothing, (0 k), in the product form) for the gradient of `aggregate`'s result."""
    polynomial = Polynomial(u.shape[2], degree, coefficients is None, axes)
    layout = grouped(lengths or [u.shape[1]], frame_length, u.device)
    block = polynomial.block(u.dtype)
    dsums = dsums.contiguous()
    if frame_length:
        dsums = running_sums(dsums, layout, reverse=True)[0]
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dc = new_coefficients(u, coefficients, layout.num_items)
    run(
        kernels.aggregate_backward,
        u.shape[0] * layout.num_items * polynomial.tiles(block),
        **_of_features(u, coefficients, positions, mask),
        frequencies=angles(polynomial, u),
        items=layout.items,
        dsums=dsums,
        du=du,
        dc=dc,
        num_tokens=u.shape[1],
        num_items=layout.num_items,
        num_groups=layout.num_groups,
        **polynomial.arguments(block, DEGREE=degree, MASKED=mask is not None),
    )
    return du, sum_of_coefficients(dc, u, coefficients, degree)


def new_coefficients(u: Tensor, coefficients: Tensor | None, num_items: int) -> Tensor:
    """Return the buffer (b items k W) of each item's gradient of the coefficients."""
    if coefficients is None:
        return u.new_empty(0, dtype=torch.float32)
    return u.new_empty(u.shape[0], num_items, *coefficients.t().shape, dtype=torch.float32)


def sum_of_coefficients(dc: Tensor, u: Tensor, coefficients: Tensor | None, degree: int) -> Tensor:
    """Return dc (W k) of all items, or (0 k) where there are no coefficients; torch adds in a fixed order."""
    if coefficients is None:
        return u.new_empty(0, degree)
    return dc.flatten(0, 1).sum(0).t().to(coefficients.dtype, memory_format=torch.contiguous_format)


@aggregate_backward.register_fake
def _(dsums, u, coefficients, positions, mask, degree, axes, lengths, frame_length):  # type: ignore[no-untyped-def]
    return torch.empty_like(u, memory_format=torch.contiguous_format), fake_coefficients(u, coefficients, degree)


def fake_coefficients(u: Tensor, coefficients: Tensor | None, degree: int) -> Tensor:
    """Return an empty tensor of the shape that `sum_of_coefficients` gives."""
    if coefficients is None:
        return u.new_empty(0, degree)
    return torch.empty_like(coefficients, memory_format=torch.contiguous_format)


def _save_aggregate(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.degree, ctx.axes, ctx.lengths, ctx.frame_length = inputs
    ctx.save_for_backward(*tensors)


def _aggregate_gradients(ctx: Any, dsums: Tensor) -> tuple[Any, ...]:
    _, coefficients, *_ = ctx.saved_tensors
    du, dc = aggregate_backward(dsums, *ctx.saved_tensors, ctx.degree, ctx.axes, ctx.lengths, ctx.frame_length)
    return du, None if coefficients is None else dc, None, None, None, None, None, None


aggregate.register_autograd(_aggregate_gradients, setup_context=_save_aggregate)


def _of_gates(
    means: Tensor, gate: Tensor, positions: Tensor | None, polynomial: Polynomial, layout: Layout
) -> dict[str, Any]:
    """Return the operands that `select` and its gradient share."""
    return {
        "means": means.contiguous(),
        **operand("gate", gate, gate),
        **turned("positions", positions, gate),
        "frequencies": angles(polynomial, gate),
        "items": layout.items,
        "num_tokens": gate.shape[1],
        "num_items": layout.num_items,
        "num_groups": layout.num_groups,
    }


@torch.library.custom_op("pomscale::pom_select", mutates_args=())
def select(
    means: Tensor,
    gate: Tensor,
    positions: Tensor | None,
    is_product: bool,
    axes: int,
    degree: int,
    lengths: Sequence[int],
    frame_length: int,
) -> Tensor:
    """Let each query select from the mean of its group -> (b m W) in the dtype of the gates.

    Args:
        means: (b groups W) fp32.
        gate: (b m W) logits of the gates, one per channel.
        positions: (m axes) or (b m axes) integers, or None.
        is_product: Whether the form is the product form.
        axes: Axes of the rotation, 0 for none.
        degree: k.
        lengths: Queries of each segment; empty = one segment of all.
        frame_length: Queries of each group of a segment, 0 = the segment is one group.
    """
    polynomial = Polynomial(gate.shape[2], degree, is_product, axes)
    layout = grouped(lengths or [gate.shape[1]], frame_length, gate.device)
    block = polynomial.block(gate.dtype)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    run(
        kernels.select,
        gate.shape[0] * layout.num_items * polynomial.tiles(block),
        **_of_gates(means, gate, positions, polynomial, layout),
        y=y,
        **polynomial.arguments(block),
    )
    return y


@select.register_fake
def _(means, gate, positions, is_product, axes, degree, lengths, frame_length):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("pomscale::pom_select_backward", mutates_args=())
def select_backward(
    dy: Tensor,
    means: Tensor,
    gate: Tensor,
    positions: Tensor | None,
    is_product: bool,
    axes: int,
    degree: int,
    lengths: Sequence[int],
    frame_length: int,
) -> tuple[Tensor, Tensor]:
    """Return dmeans (b groups W) fp32 and dgate (b m W) for the gradient of `select`'s result."""
    polynomial = Polynomial(gate.shape[2], degree, is_product, axes)
    layout = grouped(lengths or [gate.shape[1]], frame_length, gate.device)
    block = polynomial.block(gate.dtype)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    partials = gate.new_empty(gate.shape[0], layout.num_items, gate.shape[2], dtype=torch.float32)
    run(
        kernels.select_backward,
        gate.shape[0] * layout.num_items * polynomial.tiles(block),
        **operand("dy", dy, dy),
        **_of_gates(means, gate, positions, polynomial, layout),
        dgate=dgate,
        partials=partials,
        **polynomial.arguments(block),
    )
    return sum_of_items(partials, layout), dgate


@select_backward.register_fake
def _(dy, means, gate, positions, is_product, axes, degree, lengths, frame_length):  # type: ignore[no-untyped-def]
    return torch.empty_like(means), torch.empty_like(gate, memory_format=torch.contiguous_format)


def _save_select(ctx: Any, inputs: Any, output: Any) -> None:
    means, gate, positions, *ctx.constants = inputs
    ctx.save_for_backward(means, gate, positions)


def _select_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dmeans, dgate = select_backward(dy, *ctx.saved_tensors, *ctx.constants)
    return dmeans, dgate, None, None, None, None, None, None


select.register_autograd(_select_gradients, setup_context=_save_select)
