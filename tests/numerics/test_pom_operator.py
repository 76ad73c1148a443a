"""The operator against its oracle: outputs, every gradient, states, memory and the work that is done only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.ops.pom import BlockCausal, Context, Form, Mask, PomState, Queries, Segments, dispatch


def polynomial_mixer(u: Tensor, gate: Tensor, form: Form, mask: Mask = None, **how: Any) -> Tensor:
    return dispatch.polynomial_mixer(Context(u, form), Queries(gate), mask, **how)


def polynomial_mixer_step(
    u: Tensor, gate: Tensor, form: Form, past: PomState | None = None, mask: Mask = None, **how: Any
) -> tuple[Tensor, PomState]:
    return dispatch.polynomial_mixer_step(Context(u, form), Queries(gate), past, mask, **how)


BATCH, TOKENS, QUERIES, PIECE = 3, 23, 7, 5

MakeMask = Callable[[int, int, int], Mask]


def padding(batch: int, num_queries: int, num_context: int) -> Tensor:
    mask = torch.rand(batch, num_context, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[-1] = False  # one sample has no context at all
    return mask


def pattern(batch: int, num_queries: int, num_context: int) -> Tensor:
    mask = torch.rand(batch, num_queries, num_context, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0] = False  # one query has no context at all
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
}
CROSS_MASKS = {name: SELF_MASKS[name] for name in ("none", "padding", "pattern")}
CASES = [pytest.param(TOKENS, make, id=f"self-{name}") for name, make in SELF_MASKS.items()] + [
    pytest.param(QUERIES, make, id=f"cross-{name}") for name, make in CROSS_MASKS.items()
]


def operands(
    num_queries: int, degree: int, dtype: torch.dtype = torch.float64, num_context: int = TOKENS
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(degree)
    width = degree * PIECE
    u = torch.randn(BATCH, num_context, width, generator=generator, dtype=torch.float64)
    gate = torch.randn(BATCH, num_queries, width, generator=generator, dtype=torch.float64)
    return u.to(dtype), gate.to(dtype)


def output_and_gradients(u: Tensor, gate: Tensor, degree: int, mask: Mask, implementation: Any) -> list[Tensor]:
    u, gate = u.detach().requires_grad_(), gate.detach().requires_grad_()
    y = polynomial_mixer(u, gate, Form(degree=degree), mask, implementation=implementation)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (u, gate), upstream)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_queries", "make_mask"), CASES)
def test_equals_oracle(
    num_queries: int, make_mask: MakeMask, degree: int, dtype: torch.dtype, tolerance: float
) -> None:
    u, gate = operands(num_queries, degree, dtype)
    mask = make_mask(BATCH, num_queries, TOKENS)
    found = output_and_gradients(u, gate, degree, mask, "torch")
    expected = output_and_gradients(u.double(), gate.double(), degree, mask, "naive")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize(("num_queries", "make_mask"), CASES)
def test_gradients_are_those_of_finite_differences(num_queries: int, make_mask: MakeMask) -> None:
    u, gate = (x.requires_grad_() for x in operands(num_queries, degree=2))
    mask = make_mask(BATCH, num_queries, TOKENS)
    assert torch.autograd.gradcheck(
        lambda u, gate: polynomial_mixer(u, gate, Form(degree=2), mask), (u, gate), fast_mode=True
    )


def test_full_form_is_permutation_equivariant() -> None:
    u, gate = operands(TOKENS, degree=3)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    permuted = polynomial_mixer(u[:, order], gate[:, order], Form(degree=3))
    torch.testing.assert_close(permuted, polynomial_mixer(u, gate, Form(degree=3))[:, order], rtol=1e-12, atol=1e-14)


# --- carried state ---------------------------------------------------------------------------------------------------


def run_chunks(
    u: Tensor, gate: Tensor, lengths: list[int], chunk_mask: Callable[[slice], Mask]
) -> tuple[Tensor, PomState]:
    outputs, state, start = [], None, 0
    for length in lengths:
        part = slice(start, start + length)
        y, state = polynomial_mixer_step(u[:, part], gate[:, part], Form(degree=2), state, chunk_mask(part))
        outputs.append(y)
        start += length
    assert start == u.shape[1]
    assert state is not None
    return torch.cat(outputs, dim=1), state


def test_causal_in_unequal_chunks_equals_full_pass_with_gradients() -> None:
    u, gate = (x.requires_grad_() for x in operands(TOKENS, degree=2))
    chunked, state = run_chunks(u, gate, [1, 9, 2, 11], lambda part: "causal")
    full = polynomial_mixer(u, gate, Form(degree=2), "causal")
    torch.testing.assert_close(chunked, full, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(full)
    for ours, theirs in zip(
        torch.autograd.grad((chunked * weights).sum(), (u, gate)),
        torch.autograd.grad((full * weights).sum(), (u, gate)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert state.count.tolist() == [TOKENS] * BATCH


def test_frames_as_chunks_equal_block_causal_full_pass() -> None:
    u, gate = operands(TOKENS, degree=2)
    chunked, _ = run_chunks(u, gate, [5, 5, 5, 5, 3], lambda part: None)
    torch.testing.assert_close(
        chunked, polynomial_mixer(u, gate, Form(degree=2), BlockCausal(5)), rtol=1e-12, atol=1e-14
    )


def test_last_chunk_of_unequal_chunks_reads_what_the_full_form_reads() -> None:
    u, gate = operands(TOKENS, degree=2)
    mask = padding(BATCH, TOKENS, TOKENS)
    chunked, state = run_chunks(u, gate, [3, 13, 7], lambda part: mask[:, part])
    full = polynomial_mixer(u, gate, Form(degree=2), mask)
    torch.testing.assert_close(chunked[:, 16:], full[:, 16:], rtol=1e-12, atol=1e-14)
    assert torch.equal(state.count, mask.sum(1))


@pytest.mark.parametrize("chunk_mask", [None, "causal", padding(BATCH, 11, 11)], ids=["none", "causal", "padding"])
def test_step_equals_naive_step(chunk_mask: Mask) -> None:
    u, gate = operands(TOKENS, degree=2)
    _, past = polynomial_mixer_step(u[:, :12], gate[:, :12], Form(degree=2))
    args = u[:, 12:], gate[:, 12:], Form(degree=2), past, chunk_mask
    y, state = polynomial_mixer_step(*args)
    naive_y, naive_state = polynomial_mixer_step(*args, implementation="naive")
    torch.testing.assert_close(y, naive_y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state.sum, naive_state.sum, rtol=1e-12, atol=1e-14)
    assert torch.equal(state.count, naive_state.count)


def test_state_is_fp32_under_bf16_and_does_not_drift() -> None:
    """A bf16 running sum would stop growing after a few hundred tokens."""
    u, gate = operands(4096, degree=2, dtype=torch.bfloat16, num_context=4096)
    _, state = run_chunks(u, gate, [512] * 8, lambda part: None)
    assert state.sum.dtype == torch.float32
    _, exact = polynomial_mixer_step(u.double(), gate.double(), Form(degree=2))
    assert exact.sum.dtype == torch.float64
    assert relative_error(state.sum, exact.sum) < 1e-3


def test_carried_causal_state_does_not_keep_the_sequence_alive() -> None:
    u, gate = operands(TOKENS, degree=2)
    _, state = polynomial_mixer_step(u, gate, Form(degree=2), mask="causal")
    assert state.sum.untyped_storage().nbytes() == state.sum.numel() * state.sum.element_size()


# --- NaN and empty contexts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_mask", [padding, pattern])
def test_nan_in_tokens_outside_the_mask_reaches_nothing(make_mask: MakeMask) -> None:
    u, gate = operands(QUERIES, degree=3)
    mask = make_mask(BATCH, QUERIES, TOKENS)
    assert isinstance(mask, Tensor)
    mask[:, ..., -4:] = False
    unused = ~mask if mask.dim() == 2 else ~mask.any(1)
    clean = output_and_gradients(u.masked_fill(unused[..., None], 0), gate, 3, mask, "torch")
    poisoned = output_and_gradients(u.masked_fill(unused[..., None], float("nan")), gate, 3, mask, "torch")
    for ours, theirs in zip(poisoned, clean, strict=True):
        assert torch.equal(ours, theirs)
    assert bool((poisoned[1][unused] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(BATCH, TOKENS), (BATCH, QUERIES, TOKENS)], ids=str)
def test_empty_context_reads_zero_with_finite_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, gate = operands(QUERIES, degree=2, dtype=dtype)
    mask = torch.zeros(shape, dtype=torch.bool)
    for result in output_and_gradients(u, gate, 2, mask, "torch"):
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


@pytest.mark.parametrize("mask", ["causal", BlockCausal(1), BlockCausal(7), BlockCausal(64)], ids=str)
def test_ordered_masks_are_linear_in_tokens_forward_and_backward(mask: Mask) -> None:
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
    assert operations.calls.count((torch.ops.aten.mul, torch.Size((BATCH, TOKENS, PIECE)))) == degree - 1


def test_whole_frames_are_not_copied() -> None:
    u, gate = operands(24, degree=2, num_context=24)
    with Operations() as operations:
        polynomial_mixer(u, gate, Form(degree=2), BlockCausal(4))
    copies = (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.constant_pad_nd, torch.ops.aten.copy_)
    assert all(shape.numel() < u.numel() for packet, shape in operations.calls if packet in copies)


@pytest.mark.slow
@pytest.mark.parametrize("make_mask", SELF_MASKS.values(), ids=SELF_MASKS.keys())
def test_compiles_without_graph_breaks(make_mask: MakeMask) -> None:
    torch.compiler.reset()  # every mask is a graph of its own, and they count against one limit
    u, gate = (x.requires_grad_() for x in operands(TOKENS, degree=2, dtype=torch.float32))
    mask = make_mask(BATCH, TOKENS, TOKENS)
    compiled = torch.compile(
        lambda u, gate: polynomial_mixer(u, gate, Form(degree=2), mask), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(u, gate), polynomial_mixer(u, gate, Form(degree=2), mask))
    compiled(u, gate).sum().backward()


# --- wrong operands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(BATCH, TOKENS)}, "bool"),
        ({"mask": torch.ones(BATCH, TOKENS + 1, dtype=torch.bool)}, "shape"),
        ({"mask": torch.ones(QUERIES, TOKENS, dtype=torch.bool)}, "shape"),
        ({"mask": "casual"}, "casual"),
        ({"mask": "causal"}, "same tokens"),
        ({"mask": BlockCausal(4)}, "same tokens"),
        ({"form": Form(degree=3)}, "degree"),
        ({"gate": torch.zeros(BATCH, QUERIES, 4)}, "gate"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    u, gate = operands(QUERIES, degree=2)
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(**{"u": u, "gate": gate, "form": Form(degree=2), **change})


def test_frame_length_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="frame_length"):
        BlockCausal(0)


def test_step_refuses_masks_and_states_that_do_not_fit() -> None:
    u, gate = operands(TOKENS, degree=2)
    with pytest.raises(ValueError, match="step: mask"):
        polynomial_mixer_step(u, gate, Form(degree=2), None, Segments([TOKENS]))
    with pytest.raises(ValueError, match="same n"):
        polynomial_mixer_step(u, gate[:, :3], Form(degree=2))
    with pytest.raises(ValueError, match="state of shape"):
        polynomial_mixer_step(u, gate, Form(degree=2), PomState.zeros(BATCH, 3, u.dtype, u.device))
