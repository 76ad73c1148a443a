"""Layers against re-statements of their equations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

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
from pomscale.ops.pom import BlockCausal, Context, Mask, Queries, Segments, polynomial_mixer

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


MIXERS: dict[str, Callable[[], PoM | Attention]] = {
    "pom": lambda: PoM(DIM),
    "pom v2": lambda: PoM(DIM, 3, form="coefficients", bias=True),
    "pom v2 with heads": lambda: PoM(DIM, 3, form="coefficients", heads=HEADS, groups=2, bias=True),
    "attention": lambda: Attention(DIM, HEADS),
}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> PoM | Attention:
    torch.manual_seed(0)
    return MIXERS[request.param]().double()


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


# Arguments of a layer in every form, with every kind of positions.
LAYERS: dict[str, dict[str, Any]] = {
    "product": {"degree": 3},
    "product without bias": {"degree": 1, "bias": False},
    "coefficients": {"degree": 2, "form": "coefficients"},
    "heads, groups, bias": {"degree": 3, "form": "coefficients", "heads": 3, "groups": 4, "bias": True},
    "1 axis": {"degree": 2, "form": "coefficients", "heads": 6, "rope": 1},
    "2 axes": {"degree": 5, "form": "coefficients", "rope": 2},
    "3 axes": {"degree": 2, "form": "coefficients", "heads": 8, "rope": 3, "bias": True},
}
LAYER_MASKS: dict[str, Mask] = {
    **dict(zip(SELF_IDS, SELF_MASKS, strict=True)),
    "segments": Segments([4, 0, 9]),
    "segments-causal": Segments([4, 0, 9], inner="causal"),
    "segments-frames": Segments([4, 9], inner=BlockCausal(4)),
}


def layer_and_positions(name: str, dtype: torch.dtype = torch.float64) -> tuple[PoM, Tensor | None]:
    torch.manual_seed(0)
    layer = PoM(DIM, **LAYERS[name]).to(dtype)
    for parameter in layer.parameters():  # biases and coefficients that are 0, or almost, would hide an error
        nn.init.normal_(parameter)
    axes = layer.form.rope
    return layer, None if axes is None else torch.randint(0, 9, (TOKENS, axes))


@pytest.mark.parametrize("case", LAYER_MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_linear_maps_around_the_oracle(name: str, case: str) -> None:
    """The output map is applied to every query here, and to states in the layer where it folds."""
    layer, positions = layer_and_positions(name)
    x, mask = tokens().requires_grad_(), LAYER_MASKS[case]
    u = torch.cat(
        [
            F.linear(part, weight)
            for part, weight in zip(
                x.chunk(LAYERS[name].get("groups", 1), dim=-1),
                layer.projection.weight.chunk(LAYERS[name].get("groups", 1)),
                strict=True,
            )
        ],
        dim=-1,
    )
    u = u if layer.projection.bias is None else u + layer.projection.bias
    context = Context(u, layer.form, layer.coefficients, positions)
    queries = Queries(F.linear(x, layer.gate.weight, layer.gate.bias), positions)
    expected = F.linear(
        polynomial_mixer(context, queries, mask, implementation="naive"), layer.output.weight, layer.output.bias
    )
    y = layer(x, mask=mask, positions=positions)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


class _Adapted(nn.Linear):
    """Map with something beside its weight, such as the low-rank terms of LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True) + 1


@pytest.mark.parametrize("how", ["subclass", "hook", "forward"])
@pytest.mark.parametrize("name", ["projection", "gate", "output"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_what_a_map_does_beside_its_weight_is_not_passed_over(heads: int, name: str, how: str) -> None:
    mixer, x = PoM(DIM, 3, form="coefficients", heads=heads).double(), tokens()
    adapted = copy.deepcopy(mixer)
    map_ = adapted.get_submodule(name)
    if how == "subclass":
        map_.__class__ = _Adapted
    elif how == "hook":
        map_.register_forward_hook(lambda _, __, y: y + 1)
    else:
        map_.forward = lambda x: F.linear(x, map_.weight, map_.bias) + 1  # type: ignore[arg-type]

    def stepped(layer: PoM) -> Tensor:
        return layer.step(x)[0]

    for call in (lambda layer: layer(x), stepped):
        assert not torch.allclose(call(adapted), call(mixer))


@pytest.mark.parametrize("name", ["1 axis", "2 axes", "3 axes"])
def test_steps_take_the_positions_of_their_chunk(name: str) -> None:
    layer, positions = layer_and_positions(name)
    assert positions is not None
    outputs, state = [], None
    for x, places in zip(tokens().split([1, 7, 5], dim=1), positions.split([1, 7, 5]), strict=True):
        y, state = layer.step(x, state, "causal", places)
        outputs.append(y)
    full = layer(tokens(), mask="causal", positions=positions)
    torch.testing.assert_close(torch.cat(outputs, dim=1), full, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", LAYER_MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_rounds_the_maps_alone(name: str, case: str) -> None:
    """Outputs have autocast's dtype, folded or not; sums stay fp32."""
    layer, positions = layer_and_positions(name, torch.float32)
    x, mask = tokens().float(), LAYER_MASKS[case]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, mask=mask, positions=positions)
    assert y.dtype == torch.bfloat16
    exact = layer(x, mask=mask, positions=positions)
    assert ((y - exact).norm() / exact.norm()).item() < 2e-2


def test_positions_of_another_sequence() -> None:
    """The context's positions are its own; they are those of x by default, where x is the context."""
    layer, positions = layer_and_positions("2 axes")
    x = tokens()
    assert torch.equal(layer(x, positions=positions), layer(x, x, None, positions, positions))
    with pytest.raises(ValueError, match=r"context positions: .* got None"):
        layer(x, x, positions=positions)


# Every form and every mask twice or more; `exhaustive` adds the other pairs of them.
COMPILED = [
    pytest.param(name, case, marks=pytest.mark.slow if (i + j) % 4 == 0 else pytest.mark.exhaustive)
    for i, name in enumerate(LAYERS)
    for j, case in enumerate(LAYER_MASKS)
]


@pytest.mark.parametrize(("name", "case"), COMPILED)
def test_layer_compiles_without_graph_breaks(name: str, case: str) -> None:
    torch.compiler.reset()  # every mask is a graph of its own, and they count against one limit
    layer, positions = layer_and_positions(name, torch.float32)
    x, mask = tokens().float().requires_grad_(), LAYER_MASKS[case]
    compiled = torch.compile(lambda x: layer(x, mask=mask, positions=positions), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x, mask=mask, positions=positions)
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_step_compiles_without_graph_breaks() -> None:
    layer, positions = layer_and_positions("3 axes", torch.float32)
    x = tokens().float()
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    _, past = layer.step(x, None, "causal", positions)
    y, state = compiled(x, past, "causal", positions)
    expected, expected_state = layer.step(x, past, "causal", positions)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state.sum, expected_state.sum)
    assert state.form == layer.form


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
    assert mixer.output.bias is not None
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
