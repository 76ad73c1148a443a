"""The operator against its oracle: outputs, every gradient, states, memory and the work that is done only once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.ops.pom import BlockCausal, Context, Form, Mask, PomState, Queries, Segments, dispatch
from support.mixer_operands import (
    BATCH,
    CASES,
    FORMS,
    PIECE,
    QUERIES,
    SELF_MASKS,
    TOKENS,
    MakeMask,
    assert_equals_oracle,
    cast,
    padding,
    pattern,
    relative_error,
    results,
    strided,
)
from support.mixer_operands import operands as make_operands


def polynomial_mixer(u: Tensor, gate: Tensor, form: Form, mask: Mask = None, **how: Any) -> Tensor:
    return dispatch.polynomial_mixer(Context(u, form), Queries(gate), mask, **how)


def polynomial_mixer_step(
    u: Tensor, gate: Tensor, form: Form, past: PomState | None = None, mask: Mask = None, **how: Any
) -> tuple[Tensor, PomState]:
    return dispatch.polynomial_mixer_step(Context(u, form), Queries(gate), past, mask, **how)


def operands(
    num_queries: int, degree: int, dtype: torch.dtype = torch.float64, num_context: int = TOKENS
) -> tuple[Tensor, Tensor]:
    context, queries = cast(*make_operands(Form(degree=degree), num_queries, num_context), dtype)
    return context.u, queries.gate


def output_and_gradients(u: Tensor, gate: Tensor, degree: int, mask: Mask) -> list[Tensor]:
    return list(results(Context(u, Form(degree=degree)), Queries(gate), mask).values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMS)
def test_equals_oracle(name: str, case: str) -> None:
    """Every form under every mask; dtypes, layouts, positions of each sample and the output map take turns."""
    form, (num_queries, make_mask) = FORMS[name], CASES[case]
    turn = list(FORMS).index(name) + list(CASES).index(case)
    exact = make_operands(form, num_queries, TOKENS, output=turn % 2 == 0, batched=turn % 3 == 0)
    mask = make_mask(BATCH, num_queries, TOKENS)
    assert_equals_oracle(*exact, mask, strided if turn % 4 < 2 else torch.clone)
    rounded = cast(*exact, torch.float32 if turn % 2 else torch.bfloat16)
    assert_equals_oracle(*rounded, mask, strided if turn % 4 in (1, 2) else torch.clone)


@pytest.mark.parametrize("name", ["product-2", "coefficients-5-h1-r2", "coefficients-2-h8-r3"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case: str, name: str) -> None:
    num_queries, make_mask = CASES[case]
    context, queries = make_operands(FORMS[name], num_queries, TOKENS, output=True)
    mask = make_mask(BATCH, num_queries, TOKENS)
    leaves = [
        t.requires_grad_() for t in (context.u, queries.gate, queries.output, context.coefficients) if t is not None
    ]
    assert torch.autograd.gradcheck(
        lambda u, gate, output, coefficients=None: dispatch.polynomial_mixer(
            replace(context, u=u, coefficients=coefficients), replace(queries, gate=gate, output=output), mask
        ),
        leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("case", ["self-none", "self-frames-4-last-shorter", "self-segments", "cross-segments"])
@pytest.mark.parametrize("name", ["product-2", "coefficients-3-h8-r1"])
def test_a_gradient_of_some_operands_alone(name: str, case: str) -> None:
    """What needs no gradient is a constant, and the others' gradients stay what they are."""
    num_queries, make_mask = CASES[case]
    context, queries = make_operands(FORMS[name], num_queries, TOKENS, output=True)
    mask, expected = make_mask(BATCH, num_queries, TOKENS), None
    leaves = {"u": context.u, "gate": queries.gate, "output": queries.output, "coefficients": context.coefficients}
    for wanted in ("u", "gate", "output", "coefficients"):
        leaf = leaves[wanted]
        if leaf is None:
            continue
        leaf.requires_grad_()
        y = dispatch.polynomial_mixer(context, queries, mask)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        found = torch.autograd.grad(y, leaf, upstream)[0]
        leaf.requires_grad_(False)
        expected = expected or results(context, queries, mask, "naive")
        assert relative_error(found, expected[wanted]) < 1e-11


def test_full_form_is_permutation_equivariant() -> None:
    u, gate = operands(TOKENS, degree=3)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    permuted = polynomial_mixer(u[:, order], gate[:, order], Form(degree=3))
    torch.testing.assert_close(permuted, polynomial_mixer(u, gate, Form(degree=3))[:, order], rtol=1e-12, atol=1e-14)


# --- NaN and empty contexts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_mask", [padding, pattern])
def test_nan_in_tokens_outside_the_mask_reaches_nothing(make_mask: MakeMask) -> None:
    u, gate = operands(QUERIES, degree=3)
    mask = make_mask(BATCH, QUERIES, TOKENS)
    assert isinstance(mask, Tensor)
    mask[:, ..., -4:] = False
    unused = ~mask if mask.dim() == 2 else ~mask.any(1)
    clean = output_and_gradients(u.masked_fill(unused[..., None], 0), gate, 3, mask)
    poisoned = output_and_gradients(u.masked_fill(unused[..., None], float("nan")), gate, 3, mask)
    for ours, theirs in zip(poisoned, clean, strict=True):
        assert torch.equal(ours, theirs)
    assert bool((poisoned[1][unused] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(BATCH, TOKENS), (BATCH, QUERIES, TOKENS)], ids=str)
def test_empty_context_reads_zero_with_finite_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, gate = operands(QUERIES, degree=2, dtype=dtype)
    mask = torch.zeros(shape, dtype=torch.bool)
    for result in output_and_gradients(u, gate, 2, mask):
        assert torch.equal(result, torch.zeros_like(result))


def test_context_of_no_tokens_reads_zero() -> None:
    u, gate = operands(QUERIES, degree=2)
    assert torch.equal(polynomial_mixer(u[:, :0], gate, Form(degree=2)), torch.zeros_like(gate))


# --- what is computed, and how large ---------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records which operators run and the shape of every tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.calls.append((func.overloadpacket, tensor.shape))
        return result


LINEAR_MASKS = ["causal", BlockCausal(1), BlockCausal(7), BlockCausal(64), Segments([8] * 125), Segments([500] * 2)]


@pytest.mark.parametrize("mask", LINEAR_MASKS, ids=lambda mask: str(mask)[:30])
def test_orders_and_segments_are_linear_in_tokens_forward_and_backward(mask: Mask) -> None:
    num_tokens, width = 1000, 4
    u = torch.randn(1, num_tokens, width, requires_grad=True)
    gate = torch.randn(1, num_tokens, width, requires_grad=True)
    with Operations() as operations:
        polynomial_mixer(u, gate, Form(degree=2), mask).sum().backward()
    assert max(shape.numel() for _, shape in operations.calls) == num_tokens * width


@pytest.mark.parametrize("degree", [2, 3, 5])
@pytest.mark.parametrize("make_mask", SELF_MASKS.values(), ids=SELF_MASKS.keys())
def test_every_product_is_computed_once(make_mask: MakeMask, degree: int) -> None:
    u, gate = operands(TOKENS, degree)
    with Operations() as operations:
        polynomial_mixer(u, gate, Form(degree=degree), make_mask(BATCH, TOKENS, TOKENS))
    products = [shape for packet, shape in operations.calls if packet == torch.ops.aten.mul and shape[2:] == (PIECE,)]
    assert sum(shape[1] for shape in products) == (degree - 1) * TOKENS  # segments with an order multiply one by one


def test_whole_frames_are_not_copied() -> None:
    u, gate = operands(24, degree=2, num_context=24)
    with Operations() as operations:
        polynomial_mixer(u, gate, Form(degree=2), BlockCausal(4))
    copies = (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.constant_pad_nd, torch.ops.aten.copy_)
    assert all(shape.numel() < u.numel() for packet, shape in operations.calls if packet in copies)
