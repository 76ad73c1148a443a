"""Layers against re-statements of their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.layers import (
    Attention,
    PatchEmbedding,
    PoM,
    TimestepEmbedding,
    modulate,
    sincos_positions_2d,
    timestep_features,
    unpatchify,
)
from pomscale.ops.pom import BlockCausal, Mask, Segments, dense_mask

BATCH, QUERIES, TOKENS, DIM, HEADS = 2, 5, 13, 12, 3
PADDING = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
SELF_MASKS: list[Mask] = [
    None,
    "causal",
    BlockCausal(4),
    PADDING,
    torch.rand(BATCH, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.3,
]
SELF_IDS = ["none", "causal", "frames", "padding", "pattern"]


def tokens(length: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["pom", "attention"])
def mixer(request: pytest.FixtureRequest) -> PoM | Attention:
    torch.manual_seed(0)
    return (PoM(DIM) if request.param == "pom" else Attention(DIM, HEADS)).double()


# --- PoM -------------------------------------------------------------------------------------------------------------


def hom(weights: dict[str, Tensor], x: Tensor, context: Tensor, degree: int) -> Tensor:
    """The authors' layer, for one full context: expand, multiply up, average, select, aggregate."""
    expanded = F.gelu(F.linear(context, weights["ho_proj.weight"], weights.get("ho_proj.bias")))
    pieces = torch.stack(expanded.chunk(degree, dim=-1))
    mean = pieces.cumprod(0).mean(2, keepdim=True)  # (degree, b, 1, width of a piece)
    selection = F.linear(x, weights["se_proj.weight"], weights.get("se_proj.bias")).sigmoid()
    selected = selection * torch.cat(list(mean), dim=-1)
    return F.linear(selected, weights["ag_proj.weight"], weights.get("ag_proj.bias"))


def official_weights(degree: int, expand: int, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = degree * expand * DIM
    shapes: dict[str, tuple[int, ...]] = {"ho_proj": (width, DIM), "se_proj": (width, DIM), "ag_proj": (DIM, width)}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    if bias:
        weights |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in weights.items()}


@pytest.mark.parametrize(("degree", "expand", "bias"), [(2, 2, True), (1, 3, True), (4, 1, False)])
def test_official_weights_give_the_official_output(degree: int, expand: int, bias: bool) -> None:
    weights = official_weights(degree, expand, bias)
    mixer = PoM.from_official(weights, degree=degree)
    x, context = tokens(QUERIES), tokens(seed=1)
    torch.testing.assert_close(mixer(x, context), hom(weights, x, context, degree), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mixer(x), hom(weights, x, x, degree), rtol=1e-12, atol=1e-13)
    weights["ho_proj.weight"].zero_()
    assert bool(mixer.projection.weight.any()), "the layer must own its weights"


def test_official_weights_that_do_not_fit_are_refused() -> None:
    weights = official_weights(2, 2, bias=True)
    with pytest.raises(ValueError, match="degree 5"):
        PoM.from_official(weights, degree=5)
    with pytest.raises(ValueError, match="expected keys"):
        PoM.from_official({name: weight for name, weight in weights.items() if name != "se_proj.bias"})
    with pytest.raises(ValueError, match=r"ag_proj\.weight has shape"):
        PoM.from_official({**weights, "ag_proj.weight": weights["ag_proj.weight"].T})


# --- attention -------------------------------------------------------------------------------------------------------


def softmax_attention(layer: Attention, x: Tensor, context: Tensor, mask: Mask) -> Tensor:
    readable = dense_mask(mask, BATCH, x.shape[1], context.shape[1], x.device)
    key, value = layer.key_value(context).chunk(2, dim=-1)
    heads = []
    for q, k, v in zip(*(part.chunk(HEADS, dim=-1) for part in (layer.query(x), key, value)), strict=True):
        scores = (q @ k.transpose(1, 2) / math.sqrt(DIM / HEADS)).masked_fill(~readable, -math.inf)
        heads.append(scores.softmax(-1).nan_to_num(0.0) @ v)
    return layer.output(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("mask", SELF_MASKS, ids=SELF_IDS)
def test_self_attention_is_softmax_attention(mask: Mask) -> None:
    layer, x = Attention(DIM, HEADS).double(), tokens()
    torch.testing.assert_close(layer(x, mask=mask), softmax_attention(layer, x, x, mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", [None, PADDING], ids=["none", "padding"])
def test_cross_attention_is_softmax_attention(mask: Mask) -> None:
    layer, x, context = Attention(DIM, HEADS).double(), tokens(QUERIES), tokens(seed=1)
    expected = softmax_attention(layer, x, context, mask)
    torch.testing.assert_close(layer(x, context, mask), expected, rtol=1e-10, atol=1e-12)


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="num_heads 5"):
        Attention(DIM, 5)


# --- both mixers -----------------------------------------------------------------------------------------------------


def run_chunks(mixer: PoM | Attention, x: Tensor, masks: list[tuple[int, Mask]]) -> Tensor:
    outputs, state, start = [], None, 0
    for length, mask in masks:
        y, state = mixer.step(x[:, start : start + length], state, mask)
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    return torch.cat(outputs, dim=1)


def test_causal_steps_equal_the_full_pass(mixer: PoM | Attention) -> None:
    chunked = run_chunks(mixer, tokens(), [(1, "causal"), (7, "causal"), (5, "causal")])
    torch.testing.assert_close(chunked, mixer(tokens(), mask="causal"), rtol=1e-10, atol=1e-12)


def test_steps_of_frames_equal_the_block_causal_full_pass(mixer: PoM | Attention) -> None:
    chunked = run_chunks(mixer, tokens(), [(4, None), (4, None), (4, None), (1, None)])
    torch.testing.assert_close(chunked, mixer(tokens(), mask=BlockCausal(4)), rtol=1e-10, atol=1e-12)


def test_padding_is_carried_through_steps(mixer: PoM | Attention) -> None:
    chunked = run_chunks(mixer, tokens(), [(6, PADDING[:, :6]), (7, PADDING[:, 6:])])
    torch.testing.assert_close(chunked[:, 6:], mixer(tokens(), mask=PADDING)[:, 6:], rtol=1e-10, atol=1e-12)


def test_step_refuses_other_masks(mixer: PoM | Attention) -> None:
    with pytest.raises(ValueError, match="step: mask"):
        mixer.step(tokens(), None, Segments([TOKENS]))


@pytest.mark.parametrize("shape", [(BATCH, TOKENS), (BATCH, QUERIES, TOKENS)], ids=str)
def test_query_with_an_empty_context_gets_the_output_bias(mixer: PoM | Attention, shape: tuple[int, ...]) -> None:
    x, context = tokens(QUERIES).requires_grad_(), tokens(seed=1).requires_grad_()
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0] = False
    y = mixer(x, context, mask)
    assert torch.equal(y[0], mixer.output.bias.expand(QUERIES, DIM))
    y.sum().backward()
    gradients = [x.grad, context.grad, *(parameter.grad for parameter in mixer.parameters())]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


# --- small parts -----------------------------------------------------------------------------------------------------


def test_modulate() -> None:
    x, shift, scale = tokens(), tokens(1, seed=1), tokens(1, seed=2)
    torch.testing.assert_close(modulate(x, shift, scale)[1, 3], x[1, 3] * (1 + scale[1, 0]) + shift[1, 0])


def test_timestep_features() -> None:
    features = timestep_features(torch.tensor([0.0, 0.25]), 8)
    frequencies = [math.exp(-2 * math.log(1000) * i / 8) for i in range(4)]
    expected = [math.cos(250 * f) for f in frequencies] + [math.sin(250 * f) for f in frequencies]
    torch.testing.assert_close(features[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(features[1], torch.tensor(expected), rtol=0, atol=1e-4)


def test_time_is_resolved_in_fp32_under_bf16_weights() -> None:
    layer = TimestepEmbedding(8).bfloat16()
    nearby = layer(torch.tensor([0.5, 0.501]))  # equal once rounded to bf16
    assert nearby.dtype == torch.bfloat16
    assert not torch.equal(nearby[0], nearby[1])


def test_sincos_positions() -> None:
    dim, height, width = 8, 3, 5
    positions = sincos_positions_2d(height, width, dim, torch.device("cpu"), torch.float32).view(height, width, dim)
    row, column = 1, 3
    expected: list[float] = []
    for p in (column / (width - 1), row / (height - 1)):
        expected += [math.sin(math.pi * (2 * i + 1) * p) for i in range(dim // 4)]
        expected += [math.cos(math.pi * (2 * i + 1) * p) for i in range(dim // 4)]
    torch.testing.assert_close(positions[row, column], torch.tensor(expected))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions_2d(2, 2, 10, torch.device("cpu"), torch.float32)


def test_patches_are_row_major_and_unpatchify_inverts_them() -> None:
    channels, patch_size, height, width = 3, 2, 4, 6
    pictures = torch.randn(2, channels, height * patch_size, width * patch_size)
    embedding = PatchEmbedding(channels, channels * patch_size**2, patch_size)
    # An embedding that copies pixel (p, q) of channel c to token channel (p, q, c).
    pixels = torch.eye(patch_size**2 * channels).view(-1, patch_size, patch_size, channels).permute(0, 3, 1, 2)
    with torch.no_grad():
        embedding.projection.weight.copy_(pixels)
        nn.init.zeros_(embedding.projection.bias)
    patches = embedding(pictures)
    assert torch.equal(patches[1, width + 2], pictures[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())
    restored = unpatchify(patches, height, width, patch_size)
    assert torch.equal(restored, pictures)
    assert restored.is_contiguous()
    with pytest.raises(ValueError, match="patches of 2"):
        embedding(pictures[..., :-1])
