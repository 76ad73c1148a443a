"""The attention mixer against softmax attention under the dense mask: outputs, gradients, steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pomscale.layers import Attention
from pomscale.ops.pom import BlockCausal, Mask, Segments, dense_mask

BATCH, QUERIES, TOKENS, DIM, HEADS = 2, 5, 13, 12, 3
PADDING = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
PADDING[-1] = False  # one sample has no context at all
PATTERN = torch.rand(BATCH, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.3
PATTERN[0, 0] = False
SELF_MASKS: dict[str, Mask] = {
    "none": None,
    "causal": "causal",
    "frames": BlockCausal(4),
    "padding": PADDING,
    "pattern": PATTERN,
    "segments": Segments([4, 0, 9]),
    "segments-causal": Segments([4, 0, 9], inner="causal"),
    "segments-frames": Segments([0, 5, 8], inner=BlockCausal(3)),
}
CROSS_MASKS: dict[str, Mask] = {
    "none": None,
    "padding": PADDING,
    "pattern": PATTERN[:, :QUERIES],
    "segments": Segments([3, 0, 2, 0], [4, 7, 0, 2]),  # a text without tokens, tokens without text
}


def tokens(length: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(DIM, HEADS).double()


def softmax_attention(layer: Attention, x: Tensor, context: Tensor, mask: Mask) -> Tensor:
    readable = dense_mask(mask, BATCH, x.shape[1], context.shape[1], x.device)
    key, value = layer.key_value(context).chunk(2, dim=-1)
    heads = []
    for q, k, v in zip(*(part.chunk(HEADS, dim=-1) for part in (layer.query(x), key, value)), strict=True):
        scores = (q @ k.transpose(1, 2) / math.sqrt(DIM / HEADS)).exp() * readable
        heads.append(scores / scores.sum(-1, keepdim=True).clamp(min=1e-300) @ v)
    return layer.output(torch.cat(heads, dim=-1))


def assert_is_softmax_attention(x: Tensor, context: Tensor, mask: Mask, *, is_self: bool) -> None:
    layer = attention()
    y = layer(x, None if is_self else context, mask)
    expected = softmax_attention(layer, x, context, mask)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    leaves = [x, *(() if is_self else (context,)), *layer.parameters()]
    upstream = tokens(x.shape[1], seed=2)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", SELF_MASKS)
def test_self_attention_is_softmax_attention(case: str) -> None:
    x = tokens().requires_grad_()
    assert_is_softmax_attention(x, x, SELF_MASKS[case], is_self=True)


@pytest.mark.parametrize("case", CROSS_MASKS)
def test_cross_attention_is_softmax_attention(case: str) -> None:
    x, context = tokens(QUERIES).requires_grad_(), tokens(seed=1).requires_grad_()
    assert_is_softmax_attention(x, context, CROSS_MASKS[case], is_self=False)


@pytest.mark.parametrize("case", ["segments", "segments-causal", "segments-frames"])
def test_a_segment_attends_as_if_alone(case: str) -> None:
    layer, segments = attention(), SELF_MASKS[case]
    assert isinstance(segments, Segments)
    parts = [layer(part, mask=segments.inner) for part in tokens().split(list(segments.lengths), dim=1)]
    torch.testing.assert_close(layer(tokens(), mask=segments), torch.cat(parts, dim=1), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("lengths", [[4, 4, 4, 1], [8, 5], [4, 9], [12, 1], [13]], ids=str)
def test_steps_of_several_frames_equal_the_block_causal_full_pass(lengths: list[int]) -> None:
    layer, outputs, state = attention(), [], None
    for part in tokens().split(lengths, dim=1):
        y, state = layer.step(part, state, BlockCausal(4))
        outputs.append(y)
    full = layer(tokens(), mask=BlockCausal(4))
    torch.testing.assert_close(torch.cat(outputs, dim=1), full, rtol=1e-10, atol=1e-12)
