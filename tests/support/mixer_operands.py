"""Operands and masks of the mixer's operator, at odd sizes, for tests that hold a path of it to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pomscale.ops.pom import BlockCausal, Context, Form, Mask, Queries, Segments, polynomial_mixer

BATCH, TOKENS, QUERIES = 3, 23, 7
PIECE = 5  # channels of a piece of the product form
WIDTH = 40  # channels of the coefficient form: 20 pairs, which three axes do not divide; 8 heads of an odd width
OUTPUTS = 9  # width of the map that follows

MakeMask = Callable[[int, int, int], Mask]


def padding(batch: int, num_queries: int, num_context: int) -> Tensor:
    """Return a padding mask (b n) of which the last sample has no context at all."""
    mask = torch.rand(batch, num_context, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[-1] = False
    return mask


def pattern(batch: int, num_queries: int, num_context: int) -> Tensor:
    """Return a mask (b m n) of which the first query has no context at all."""
    mask = torch.rand(batch, num_queries, num_context, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0] = False
    return mask


SELF_MASKS: dict[str, MakeMask] = {
    "none": lambda *shape: None,
    "padding": padding,
    "pattern": pattern,
    "causal": lambda *shape: "causal",
    "frames-1": lambda *shape: BlockCausal(1),
    "frames-4-last-shorter": lambda *shape: BlockCausal(4),
    "frames-23-one": lambda *shape: BlockCausal(TOKENS),
    "frames-longer-than-n": lambda *shape: BlockCausal(100),
    "segments": lambda *shape: Segments([0, 5, 0, 11, 1, 6]),
    "segments-causal": lambda *shape: Segments([5, 0, 12, 6], inner="causal"),
    "segments-frames": lambda *shape: Segments([5, 0, 12, 6], inner=BlockCausal(4)),
}
# Segment 1 has text but no tokens, 2 has neither, 3 has tokens but no text.
CROSS_MASKS: dict[str, MakeMask] = {
    **{name: SELF_MASKS[name] for name in ("none", "padding", "pattern")},
    "segments": lambda *shape: Segments([3, 0, 0, 2, 1, 1], [9, 4, 0, 0, 1, 9]),
}
CASES = {
    **{f"self-{name}": (TOKENS, make) for name, make in SELF_MASKS.items()},
    **{f"cross-{name}": (QUERIES, make) for name, make in CROSS_MASKS.items()},
}

PRODUCTS = [Form("product", degree) for degree in (1, 2, 3, 4, 5)]
# Every degree, gates per channel and per head, and every rotary kind with either; not all of their combinations.
COEFFICIENTS = [
    Form("coefficients", degree, heads, rope)
    for degree, heads, rope in [
        *[(1, 1, None), (2, 8, None), (3, 1, None), (4, 2, None), (5, 20, None)],
        *[(2, 1, 1), (3, 8, 1), (5, 1, 2), (1, 8, 2), (4, 1, 3), (2, 8, 3)],
    ]
]
FORMS = {
    f"{form.name}-{form.degree}" + (f"-h{form.heads}-r{form.rope or 0}" if form.name != "product" else ""): form
    for form in [*PRODUCTS, *COEFFICIENTS]
}


def strided(x: Tensor) -> Tensor:
    """Return the same values at odd strides along every dimension: a view of a larger tensor, transposed."""
    wide = x.new_full((x.shape[1], x.shape[0], 2 * x.shape[2] + 1), float("nan"))
    view = wide.transpose(0, 1)[:, :, 1::2]
    view.copy_(x)
    return view


def operands(
    form: Form, num_queries: int, num_context: int, *, output: bool = False, batched: bool = False
) -> tuple[Context, Queries]:
    """Return random operands in float64; batched: positions are (b n axes) instead of (n axes)."""
    generator = torch.Generator().manual_seed(form.degree)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def positions(length: int) -> Tensor | None:
        shape = (BATCH, length) if batched else (length,)
        return None if form.rope is None else torch.randint(0, 30, (*shape, form.rope), generator=generator)

    width = form.degree * PIECE if form.name == "product" else WIDTH
    context_positions = positions(num_context)
    query_positions = context_positions if num_queries == num_context else positions(num_queries)
    coefficients = None if form.name == "product" else normal(width, form.degree)
    context = Context(normal(BATCH, num_context, width), form, coefficients, context_positions)
    gate = 1.5 * normal(BATCH, num_queries, form.num_gates(width))  # some beyond +-3, where hardsigmoid is flat
    return context, Queries(gate, query_positions, normal(OUTPUTS, width) if output else None)


def cast(
    context: Context, queries: Queries, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[Context, Queries]:
    """Return the operands in another dtype, u and gate laid out by `layout`."""
    coefficients = None if context.coefficients is None else context.coefficients.to(dtype)
    output = None if queries.output is None else queries.output.to(dtype)
    return (
        replace(context, u=layout(context.u.to(dtype)), coefficients=coefficients),
        replace(queries, gate=layout(queries.gate.to(dtype)), output=output),
    )


def results(context: Context, queries: Queries, mask: Mask, implementation: Any = "torch") -> dict[str, Tensor]:
    """Return the output and the gradient of every operand, for one fixed gradient of the output."""
    leaves = {
        "u": context.u.detach().requires_grad_(),
        "gate": queries.gate.detach().requires_grad_(),
        **({} if context.coefficients is None else {"coefficients": context.coefficients.detach().requires_grad_()}),
        **({} if queries.output is None else {"output": queries.output.detach().requires_grad_()}),
    }
    y = polynomial_mixer(
        replace(context, u=leaves["u"], coefficients=leaves.get("coefficients")),
        replace(queries, gate=leaves["gate"], output=leaves.get("output")),
        mask,
        implementation=implementation,
    )
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, Euclidean, of all entries together."""
    error = (found.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30))


TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_equals_oracle(context: Context, queries: Queries, mask: Mask, layout: Any = torch.clone) -> None:
    """Hold the path of PyTorch to the oracle on operands of one dtype: output and every gradient."""
    dtype = context.u.dtype
    found = results(*cast(context, queries, dtype, layout), mask)
    expected = results(*cast(context, queries, torch.float64), mask, "naive")
    for name, ours in found.items():
        assert ours.dtype == dtype
        assert relative_error(ours, expected[name]) < TOLERANCES[dtype], name
