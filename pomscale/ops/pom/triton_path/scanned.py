"""Custom operator of causal masks: each token reads the tokens up to itself, and its own gates select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pomscale.ops.pom.triton_path import scan_kernels
from pomscale.ops.pom.triton_path.grouped import fake_coefficients, item_sums, new_coefficients, sum_of_coefficients
from pomscale.ops.pom.triton_path.launch import Polynomial, angles, operand, run, running_sums, turned
from pomscale.ops.pom.triton_path.layout import Layout, scanned


def _operands(
    u: Tensor,
    gate: Tensor | None,
    coefficients: Tensor | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    past_count: Tensor | None,
) -> dict[str, Any]:
    return {
        **operand("u", u, u),
        **operand("gate", gate, u),
        "coefficients": u if coefficients is None else coefficients.t().contiguous(),
        **turned("positions", positions, u),
        **turned("query_positions", query_positions, u),
        "past_count": u if past_count is None else past_count,
        "num_tokens": u.shape[1],
    }


def _carries(
    u: Tensor,
    coefficients: Tensor | None,
    positions: Tensor | None,
    past_sum: Tensor | None,
    polynomial: Polynomial,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Return the sums before each item (b items W) and after each segment (b segments W), fp32."""
    partials = item_sums(u, coefficients, positions, None, polynomial, layout)
    initial = None if past_sum is None else past_sum.contiguous()
    return running_sums(partials, layout, initial=initial, exclusive=True)


@torch.library.custom_op("pomscale::pom_scan", mutates_args=())
def scan(
    u: Tensor,
    gate: Tensor | None,
    coefficients: Tensor | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    past_sum: Tensor | None,
    past_count: Tensor | None,
    dtype: torch.dtype,
    degree: int,
    axes: int,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Mix causally -> (b n W) of `dtype`, and the sum after each segment (b segments W) fp32.

    Args:
        u: (b n W) pre-activations.
        gate: (b n W) logits of the gates, one per channel; None = the result is H itself.
        coefficients: (W k), of the coefficient form alone.
        positions: (n axes) or (b n axes) integers of the features, or None.
        query_positions: The same of the gates.
        past_sum: (b 1 W) fp32, sum of earlier tokens, or None; with one segment alone.
        past_count: (b,) int64, their number.
        dtype: That of the result.
        degree: k.
        axes: Axes of the rotation, 0 for none.
        lengths: Tokens of each segment; empty = one segment of all.
    """
    polynomial = Polynomial(u.shape[2], degree, coefficients is None, axes)
    layout = scanned(lengths or [u.shape[1]], u.device)
    block = polynomial.block(u.dtype)
    carries, totals = _carries(u, coefficients, positions, past_sum, polynomial, layout)
    y = torch.empty(u.shape, dtype=dtype, device=u.device)
    run(
        scan_kernels.scan,
        u.shape[0] * layout.num_items * polynomial.tiles(block),
        **_operands(u, gate, coefficients, positions, query_positions, past_count),
        frequencies=angles(polynomial, u),
        items=layout.items,
        carries=carries,
        y=y,
        num_items=layout.num_items,
        **_constants(polynomial, block, gate, past_count),
    )
    return y, totals


def _constants(polynomial: Polynomial, block: int, gate: Tensor | None, past_count: Tensor | None) -> dict[str, Any]:
    return polynomial.arguments(block, DEGREE=polynomial.degree, GATED=gate is not None, PAST=past_count is not None)


@scan.register_fake
def _(u, gate, coefficients, positions, query_positions, past_sum, past_count, dtype, degree, axes, lengths):  # type: ignore[no-untyped-def]
    totals = u.new_empty(u.shape[0], len(lengths) or 1, u.shape[2], dtype=torch.float32)
    return torch.empty(u.shape, dtype=dtype, device=u.device), totals


@torch.library.custom_op("pomscale::pom_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dtotals: Tensor,
    u: Tensor,
    gate: Tensor | None,
    coefficients: Tensor | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    past_sum: Tensor | None,
    past_count: Tensor | None,
    degree: int,
    axes: int,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return du (b n W), dgate (b n W) or (0,), dc (W k) or (0 k), and the gradient (b segments W) of what is past."""
    polynomial = Polynomial(u.shape[2], degree, coefficients is None, axes)
    layout = scanned(lengths or [u.shape[1]], u.device)
    block = polynomial.block(u.dtype)
    programs = u.shape[0] * layout.num_items * polynomial.tiles(block)
    shared = {
        **operand("dy", dy, dy),
        **_operands(u, gate, coefficients, positions, query_positions, past_count),
        "frequencies": angles(polynomial, u),
        "items": layout.items,
        "num_items": layout.num_items,
        **_constants(polynomial, block, gate, past_count),
    }
    carries = partials = u.new_empty(u.shape[0], layout.num_items, u.shape[2], dtype=torch.float32)
    if gate is not None:
        carries, _ = _carries(u, coefficients, positions, past_sum, polynomial, layout)
        partials = torch.empty_like(carries)
    dgate = u.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    run(scan_kernels.scan_backward_of_gates, programs, **shared, carries=carries, dgate=dgate, partials=partials)
    carries, dpast = running_sums(partials, layout, initial=dtotals.contiguous(), reverse=True, exclusive=True)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dc = new_coefficients(u, coefficients, layout.num_items)
    run(scan_kernels.scan_backward_of_features, programs, **shared, carries=carries, du=du, dc=dc)
    return du, dgate, sum_of_coefficients(dc, u, coefficients, degree), dpast


@scan_backward.register_fake
def _(dy, dtotals, u, gate, coefficients, positions, query_positions, past_sum, past_count, degree, axes, lengths):  # type: ignore[no-untyped-def]
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dgate = u.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    return du, dgate, fake_coefficients(u, coefficients, degree), torch.empty_like(dtotals)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, ctx.degree, ctx.axes, ctx.lengths = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dtotals: Tensor) -> tuple[Any, ...]:
    _, gate, coefficients, _, _, past_sum, _ = ctx.saved_tensors
    du, dgate, dc, dpast = scan_backward(dy, dtotals, *ctx.saved_tensors, ctx.degree, ctx.axes, ctx.lengths)
    return (
        du,
        None if gate is None else dgate,
        None if coefficients is None else dc,
        None,
        None,
        None if past_sum is None else dpast,
        *[None] * 5,
    )


scan.register_autograd(_gradients, setup_context=_save)
