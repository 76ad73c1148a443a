"""Packed sequences: each segment alone, whatever lies beside it, and no cost beyond the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomscale.ops.pom import BlockCausal, Form, Segments, dense_mask, polynomial_mixer
from support.mixer_operands import FORMS, QUERIES, TOKENS, cast, operands, relative_error, results

SEGMENT_FORMS = ["product-3", "coefficients-3-h1-r0", "coefficients-2-h8-r3", "coefficients-3-h8-r1"]
LENGTHS = [5, 0, 12, 6]
SEGMENTS = {
    "self": Segments(LENGTHS),
    "the same written out": Segments(LENGTHS, LENGTHS),
    "causal": Segments(LENGTHS, inner="causal"),
    "frames": Segments(LENGTHS, LENGTHS, BlockCausal(5)),
    "texts": Segments([3, 0, 2, 2], [9, 4, 0, 10]),
    "one": Segments([TOKENS]),
}


def queries_of(segments: Segments) -> int:
    return sum(segments.lengths)


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("name", SEGMENT_FORMS)
def test_segments_are_a_pattern_of_blocks(name: str, case: str) -> None:
    """The mask (b m n) is written here pair by pair, and not by `dense_mask`."""
    segments = SEGMENTS[case]
    context, queries = operands(FORMS[name], queries_of(segments), TOKENS, output=True, batched=True)
    query_of = [number for number, length in enumerate(segments.lengths) for _ in range(length)]
    context_of = [number for number, length in enumerate(segments.of_context) for _ in range(length)]
    frame = {None: TOKENS, "causal": 1, BlockCausal(5): 5}[segments.inner]
    block = torch.tensor(
        [
            [
                a == b and (context_of[:j].count(b)) // frame <= (query_of[:i].count(a)) // frame
                for j, b in enumerate(context_of)
            ]
            for i, a in enumerate(query_of)
        ]
    )
    pattern = block.expand(len(context.u), -1, -1)
    assert torch.equal(dense_mask(segments, *pattern.shape, context.u.device), pattern)
    found, expected = results(context, queries, segments), results(context, queries, pattern, "naive")
    for part, ours in found.items():
        assert relative_error(ours, expected[part]) < 1e-11, part


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("name", SEGMENT_FORMS)
def test_a_segment_reads_what_it_would_read_alone(name: str, case: str) -> None:
    segments = SEGMENTS[case]
    context, queries = operands(FORMS[name], queries_of(segments), TOKENS, output=True)
    contexts, parts = context.split(segments.of_context), queries.split(segments.lengths)
    alone = [polynomial_mixer(*part, segments.inner) for part in zip(contexts, parts, strict=True)]
    packed = polynomial_mixer(context, queries, segments)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["self", "causal", "frames"])
@pytest.mark.parametrize("name", ["product-3", "coefficients-2-h8-r3"])
def test_nan_in_one_segment_stays_there(name: str, case: str) -> None:
    context, queries = operands(FORMS[name], TOKENS, TOKENS, output=True)
    clean = results(context, queries, SEGMENTS[case])
    u = context.u.clone()
    u[:, 5:17] = float("nan")
    found = results(replace(context, u=u), queries, SEGMENTS[case])
    for part in ("y", "u", "gate"):
        for tokens in (slice(0, 5), slice(17, TOKENS)):
            assert torch.equal(found[part][:, tokens], clean[part][:, tokens])
    assert bool(found["y"][:, 5:17].isnan().all())


def test_segments_without_any_token() -> None:
    context, queries = operands(FORMS["coefficients-2-h8-r0"], QUERIES, TOKENS)
    nothing = Segments([0, 0])
    assert polynomial_mixer(context.split([0, TOKENS])[0], queries.split([0, QUERIES])[0], nothing).shape[1] == 0
    unread = results(context, queries, Segments([QUERIES, 0], [0, TOKENS]))
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in unread.values())


@pytest.mark.parametrize("inner", [None, "causal"], ids=str)
def test_gradients_of_many_segments_are_summed_in_fp32(inner: Any) -> None:
    """A bf16 sum of 256 gradients of one matrix is off by more than 2 %."""
    form = Form("coefficients", 3, heads=8)
    rounded = cast(*operands(form, 1024, 1024, output=True), torch.bfloat16)
    segments = Segments([4] * 256, inner=inner)
    found, exact = results(*rounded, segments), results(*cast(*rounded, torch.float64), segments)
    for name in ("coefficients", "output"):
        assert relative_error(found[name], exact[name]) < 1e-2


class Written(TorchDispatchMode):
    """Counts the numbers that operators write, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves(result)
            self.total += sum(tensor.numel() for tensor in leaves if isinstance(tensor, Tensor))
        return result


@pytest.mark.parametrize("inner", [None, "causal", BlockCausal(4)], ids=str)
@pytest.mark.parametrize("name", ["product-2", "coefficients-2-h8-r3"])
def test_work_does_not_grow_with_the_number_of_segments(name: str, inner: Any) -> None:
    """A gradient of the whole size for each segment, as a slice would give, makes it quadratic."""
    context, queries = operands(FORMS[name], 480, 480)
    totals = []
    for count in (2, 40):
        context.u.requires_grad_()
        with Written() as written:
            polynomial_mixer(context, queries, Segments([480 // count] * count, inner=inner)).sum().backward()
        totals.append(written.total)
    assert totals[1] < 1.5 * totals[0]
