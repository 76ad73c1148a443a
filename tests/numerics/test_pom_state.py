"""Carried states: chunks of any sizes equal the full pass, in every form; what a state holds, and how exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pomscale.ops.pom import (
    BlockCausal,
    Context,
    Form,
    Mask,
    PomState,
    Queries,
    polynomial_mixer,
    polynomial_mixer_step,
)
from support.mixer_operands import (
    BATCH,
    FORMS,
    TOKENS,
    cast,
    operands,
    padding,
    relative_error,
)

STATE_FORMS = ["product-2", "product-3", "coefficients-3-h1-r0", "coefficients-2-h8-r0", "coefficients-5-h1-r2"]
STATE_FORMS += ["coefficients-3-h8-r1", "coefficients-2-h8-r3"]
PADDING = padding(BATCH, TOKENS, TOKENS)


def run_chunks(
    context: Context, queries: Queries, lengths: list[int], chunk_mask: Callable[[slice], Mask]
) -> tuple[Tensor, PomState]:
    outputs, state, start = [], None, 0
    for context_part, query_part in zip(context.split(lengths), queries.split(lengths), strict=True):
        part = slice(start, start + context_part.u.shape[1])
        y, state = polynomial_mixer_step(context_part, query_part, state, chunk_mask(part))
        outputs.append(y)
        start = part.stop
    assert state is not None
    return torch.cat(outputs, dim=1), state


# Lengths of the chunks, the mask of each, the mask of the full pass, and the first token whose output must agree: a
# chunk without order reads all of itself, so that only the last chunk of unordered ones reads what the full pass reads.
CHUNKS: dict[str, tuple[list[int], Callable[[slice], Mask], Mask, int]] = {
    "causal": ([1, 9, 2, 11], lambda part: "causal", "causal", 0),
    "causal one by one": ([1] * TOKENS, lambda part: "causal", "causal", 0),
    "frames as chunks": ([5, 5, 5, 5, 3], lambda part: None, BlockCausal(5), 0),
    "one and three frames": ([5, 15, 3], lambda part: BlockCausal(5), BlockCausal(5), 0),
    "two frames, then two and a part": ([10, 13], lambda part: BlockCausal(5), BlockCausal(5), 0),
    "padding": ([3, 13, 7], lambda part: PADDING[:, part], PADDING, 16),
    "no mask": ([13, 3, 7], lambda part: None, None, 16),
}


@pytest.mark.parametrize("case", CHUNKS)
@pytest.mark.parametrize("name", STATE_FORMS)
def test_chunks_equal_the_full_pass_with_gradients(name: str, case: str) -> None:
    lengths, chunk_mask, mask, start = CHUNKS[case]
    context, queries = operands(FORMS[name], TOKENS, TOKENS, output=True, batched=True)
    tensors = (context.u, queries.gate, context.coefficients, queries.output)
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    chunked, state = run_chunks(context, queries, lengths, chunk_mask)
    full = polynomial_mixer(context, queries, mask)
    torch.testing.assert_close(chunked[:, start:], full[:, start:], rtol=1e-11, atol=1e-13)
    weights = torch.randn_like(full)
    weights[:, :start] = 0
    for ours, theirs in zip(
        torch.autograd.grad((chunked * weights).sum(), leaves),
        torch.autograd.grad((full * weights).sum(), leaves),
        strict=True,
    ):
        assert relative_error(ours, theirs) < 1e-11
    expected = mask.sum(1) if isinstance(mask, Tensor) else torch.tensor([TOKENS] * BATCH)
    assert torch.equal(state.count, expected)


STEP_MASKS = {"none": None, "causal": "causal", "frames": BlockCausal(4), "padding": PADDING[:, 12:]}


@pytest.mark.parametrize("case", STEP_MASKS)
@pytest.mark.parametrize("name", STATE_FORMS)
def test_step_equals_naive_step(name: str, case: str) -> None:
    context, queries = operands(FORMS[name], TOKENS, TOKENS, output=True)
    (first, second), (earlier, later) = context.split([12, 11]), queries.split([12, 11])
    _, past = polynomial_mixer_step(first, earlier)
    y, state = polynomial_mixer_step(second, later, past, STEP_MASKS[case])
    naive_y, naive_state = polynomial_mixer_step(second, later, past, STEP_MASKS[case], implementation="naive")
    torch.testing.assert_close(y, naive_y, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(state.sum, naive_state.sum, rtol=1e-11, atol=1e-13)
    assert torch.equal(state.count, naive_state.count)


@pytest.mark.parametrize("form", [Form(degree=2), Form("coefficients", 3, rope=1)], ids=["product", "coefficients"])
def test_state_is_fp32_under_bf16_and_does_not_drift(form: Form) -> None:
    """A bf16 running sum would stop growing after a few hundred tokens."""
    exact = operands(form, 4096, 4096)
    rounded = cast(*exact, torch.bfloat16)
    _, state = run_chunks(*rounded, [512] * 8, lambda part: None)
    assert state.sum.dtype == torch.float32
    _, expected = polynomial_mixer_step(*cast(*rounded, torch.float64))
    assert expected.sum.dtype == torch.float64
    assert relative_error(state.sum, expected.sum) < 1e-3


def test_carried_causal_state_does_not_keep_the_sequence_alive() -> None:
    _, state = polynomial_mixer_step(*operands(Form(), TOKENS, TOKENS), mask="causal")
    assert state.sum.untyped_storage().nbytes() == state.sum.numel() * state.sum.element_size()


def test_states_of_disjoint_tokens_add() -> None:
    context, queries = operands(FORMS["coefficients-3-h8-r1"], TOKENS, TOKENS)
    parts = zip(context.split([9, 14]), queries.split([9, 14]), strict=True)
    first, second = (polynomial_mixer_step(*part)[1] for part in parts)
    _, whole = polynomial_mixer_step(context, queries)
    torch.testing.assert_close((first + second).sum, whole.sum, rtol=1e-12, atol=1e-14)
    assert torch.equal((first + second).count, whole.count)


def test_a_state_without_a_form_is_taken_as_it_is() -> None:
    """States read from files have none."""
    context, queries = operands(Form(), TOKENS, TOKENS)
    _, past = polynomial_mixer_step(context, queries)
    y, state = polynomial_mixer_step(context, queries, replace(past, form=None))
    assert torch.equal(y, polynomial_mixer_step(context, queries, past)[0])
    assert state.form == Form()
