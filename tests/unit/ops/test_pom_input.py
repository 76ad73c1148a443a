"""Operands, masks and states that do not fit end in one ValueError that tells what was expected and what was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pomscale.ops.pom import (
    BlockCausal,
    Context,
    Form,
    PomState,
    Queries,
    Segments,
    polynomial_mixer,
    polynomial_mixer_step,
)

BATCH, QUERIES, TOKENS, WIDTH = 2, 3, 5, 16
PRODUCT, TURNED = Form("product", 2), Form("coefficients", 3, 4, 2)


def tensors(form: Form, num_queries: int = QUERIES) -> tuple[Context, Queries]:
    def places(length: int) -> torch.Tensor | None:
        return None if form.rope is None else torch.zeros(length, form.rope, dtype=torch.int64)

    coefficients = None if form.name == "product" else torch.zeros(WIDTH, form.degree)
    context = Context(torch.zeros(BATCH, TOKENS, WIDTH), form, coefficients, places(TOKENS))
    return context, Queries(torch.zeros(BATCH, num_queries, form.num_gates(WIDTH)), places(num_queries))


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "v3"}, "expected 'product' .* or 'coefficients' .*, got 'v3'"),
        ({"degree": 0}, "degree: expected a whole number of at least 1, got 0"),
        ({"degree": -1}, "degree: expected .* got -1"),
        ({"degree": 2.0}, "degree: expected .* got 2.0"),
        ({"degree": True}, "degree: expected .* got True"),
        ({"degree": "2"}, "degree: expected .* got '2'"),
        ({"name": "coefficients", "heads": 0}, "heads: expected a whole number of at least 1, got 0"),
        ({"name": "coefficients", "rope": 0}, "rope: expected None or 1, 2 or 3 axes, got 0"),
        ({"name": "coefficients", "rope": 4}, "rope: expected .* got 4"),
        ({"name": "coefficients", "rope": True}, "rope: expected .* got True"),
        ({"name": "coefficients", "rope": 2.0}, "rope: expected .* got 2.0"),
        ({"heads": 4}, "'product' .* has neither heads nor rope"),
        ({"rope": 1}, "'product' .* has neither heads nor rope"),
    ],
)
def test_forms_that_do_not_exist(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Form(**arguments)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockCausal(0), "frame_length: expected a whole number of at least 1, got 0"),
        (lambda: BlockCausal(1.5), "frame_length: expected .* got 1.5"),  # type: ignore[arg-type]
        (lambda: Segments([]), r"expected lengths of at least one segment, got \[\]"),
        (lambda: Segments(7), "expected lengths of at least one segment, got 7"),  # type: ignore[arg-type]
        (lambda: Segments([3, -1]), "lengths: expected a whole number of at least 0, got -1"),
        (lambda: Segments([1.0, 2.0]), "lengths: expected .* got 1.0"),  # type: ignore[list-item]
        (lambda: Segments(torch.ones(2, 2)), "lengths: expected .*, got"),  # type: ignore[arg-type]
        (lambda: Segments([1], [2.0]), "context_lengths: expected .* got 2.0"),  # type: ignore[list-item]
        (lambda: Segments([1, 2], [3]), "expected a context length for each of 2 segments, got 1"),
        (lambda: Segments([1, 2], [2, 1], "causal"), "inner needs queries and context to be the same tokens"),
        (lambda: Segments([1], inner="acausal"), "inner must be .* got 'acausal'"),  # type: ignore[arg-type]
    ],
)
def test_masks_that_do_not_exist(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("lengths", [torch.tensor([2, 3]), np.array([2, 3]), (2, 3)], ids=lambda x: type(x).__name__)
def test_lengths_come_in_any_sequence(lengths: Any) -> None:
    assert Segments(lengths) == Segments([2, 3])
    assert hash(Segments(lengths)) == hash(Segments([2, 3]))


def of_ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(BATCH, TOKENS), "expected a bool tensor .* got torch.float32"),
        (of_ones(BATCH, TOKENS + 1), r"expected shape \(2, 5\) or \(2, 3, 5\), got \(2, 6\)"),
        (of_ones(BATCH, QUERIES), r"expected shape \(2, 5\) or \(2, 3, 5\), got \(2, 3\)"),
        (of_ones(QUERIES, TOKENS), r"expected shape \(2, 5\) or \(2, 3, 5\), got \(3, 5\)"),
        (of_ones(BATCH, TOKENS, QUERIES), r"expected shape .* got \(2, 5, 3\)"),
        (of_ones(TOKENS), r"expected shape .* got \(5,\)"),
        ("casual", "expected None, .* got 'casual'"),
        (4, "expected None, .* got 4"),
        ("causal", "same tokens, got 3 queries and 5 context tokens"),
        (BlockCausal(4), "same tokens, got 3 queries and 5 context tokens"),
        (Segments([1, 1], [2, 3]), "lengths must add up to the 3 tokens, got 2"),
        (Segments([1, 2], [2, 2]), "context_lengths .* must add up to the 5 tokens, got 4"),
        (Segments([1, 2]), r"context_lengths \(by default lengths\) must add up to the 5 tokens, got 3"),
    ],
)
@pytest.mark.parametrize("form", [PRODUCT, TURNED], ids=["product", "coefficients"])
def test_masks_that_do_not_fit(form: Form, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(*tensors(form), mask)


# --- operands --------------------------------------------------------------------------------------------------------

Change = Callable[[Context, Queries], tuple[Context, Queries]]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (PRODUCT, lambda c, q: (replace(c, form=Form(degree=3)), q), "degree: 3 does not divide the 16 channels"),
        (PRODUCT, lambda c, q: (replace(c, u=c.u[0]), q), r"expected u \(b n c\) .*, got \(5, 16\)"),
        (PRODUCT, lambda c, q: (replace(c, u=c.u[:1]), q), r"of one b, got \(1, 5, 16\) and \(2, 3, 16\)"),
        (PRODUCT, lambda c, q: (c, replace(q, gate=q.gate[..., :4])), r"gate: expected \(b m 16\) .* got \(2, 3, 4\)"),
        (TURNED, lambda c, q: (c, replace(q, gate=q.gate[..., :2])), r"gate: expected \(b m 4\) .* got \(2, 3, 2\)"),
        (TURNED, lambda c, q: (replace(c, form=replace(c.form, heads=3)), q), "heads: 3 do not divide the 16 channels"),
        (PRODUCT, lambda c, q: (replace(c, coefficients=torch.zeros(16, 2)), q), r"expected None .* got \(16, 2\)"),
        (TURNED, lambda c, q: (replace(c, coefficients=None), q), r"expected shape \(16, 3\), got None"),
        (TURNED, lambda c, q: (replace(c, coefficients=torch.zeros(16, 2)), q), r"shape \(16, 3\), got \(16, 2\)"),
        (TURNED, lambda c, q: (c, replace(q, output=torch.zeros(7, 4))), r"output: expected .*\(d, 16\), got \(7, 4\)"),
        (PRODUCT, lambda c, q: (replace(c, positions=torch.zeros(5, 1)), q), "context positions: expected None .* got"),
        (TURNED, lambda c, q: (replace(c, positions=None), q), r"context positions: .* \(2, 5, 2\), got None"),
        (TURNED, lambda c, q: (c, replace(q, positions=None)), r"^positions: .* \(3, 2\) or \(2, 3, 2\), got None"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit(form: Form, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(*change(*tensors(form)))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.zeros(QUERIES, 1, dtype=torch.int64), r"\(3, 2\) or \(2, 3, 2\), got torch.int64 of shape \(3, 1\)"),
        (torch.zeros(QUERIES, 3, dtype=torch.int64), r"shape \(3, 2\) or .* got torch.int64 of shape \(3, 3\)"),
        (torch.zeros(QUERIES, dtype=torch.int64), r"shape \(3, 2\) or .* got torch.int64 of shape \(3,\)"),
        (torch.zeros(TOKENS, 2, dtype=torch.int64), r"shape \(3, 2\) or .* got torch.int64 of shape \(5, 2\)"),
        (torch.zeros(1, QUERIES, 2, dtype=torch.int64), r"got torch.int64 of shape \(1, 3, 2\)"),
        (torch.zeros(QUERIES, 2), "expected integers .* got torch.float32"),
        (of_ones(QUERIES, 2), "expected integers .* got torch.bool"),
        (torch.zeros(QUERIES, 2, dtype=torch.complex64), "expected integers .* got torch.complex64"),
        ([[0, 0]] * QUERIES, "expected integers .* got list"),
    ],
)  # fmt: skip
def test_positions_that_do_not_fit(positions: Any, message: str) -> None:
    context, queries = tensors(TURNED)
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(context, replace(queries, positions=positions))


# --- steps and states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments([TOKENS]), "step: mask must be .* got Segments"),
        (of_ones(BATCH, TOKENS, TOKENS), r"step: mask must be .* got shape \(2, 5, 5\)"),
        (of_ones(BATCH, TOKENS - 1), r"mask: expected shape \(2, 5\) .* got \(2, 4\)"),
    ],
)
def test_masks_that_a_step_cannot_have(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_mixer_step(*tensors(TURNED, TOKENS), None, mask)


def test_a_step_of_no_tokens_and_of_other_queries() -> None:
    context, queries = tensors(PRODUCT, TOKENS)
    with pytest.raises(ValueError, match="the same n >= 1 tokens, got 5 and 3"):
        polynomial_mixer_step(context, tensors(PRODUCT)[1])
    with pytest.raises(ValueError, match="the same n >= 1 tokens, got 0 and 0"):
        polynomial_mixer_step(context.split([0, TOKENS])[0], queries.split([0, TOKENS])[0])


def state(form: Form, batch: int = BATCH, width: int = WIDTH) -> PomState:
    return replace(PomState.zeros(batch, width, torch.float32, torch.device("cpu")), form=form)


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (state(TURNED, width=8), r"state of shape \(2, 16\) with counts \(2,\), got \(2, 8\) and \(2,\)"),
        (state(TURNED, batch=1), r"state of shape \(2, 16\) with counts \(2,\), got \(1, 16\) and \(1,\)"),
        (replace(state(TURNED), count=torch.zeros(1)), r"with counts \(2,\), got \(2, 16\) and \(1,\)"),
        (state(PRODUCT), r"expected a state of Form\(name='coefficients', .*, got one of Form\(name='product'"),
        (state(replace(TURNED, degree=2)), r"expected a state of Form\(.*degree=3.*, got one of Form\(.*degree=2"),
        (torch.zeros(BATCH, WIDTH), "expected a PomState, got Tensor"),
    ],
)
def test_states_of_another_mixer(past: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_mixer_step(*tensors(TURNED, TOKENS), past)
