"""The authors' mixers in our own words (HoM, PoM, PoMRoPE, JiTpp's older PoM), and ours with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.layers import PoM
from pomscale.ops.pom import Mask, dense_mask

BATCH, QUERIES, TOKENS, DIM = 2, 5, 13, 16
SIDE = 6  # positions of a table


class Layer(NamedTuple):
    """Arguments of an official layer. fused: one matrix for context and gates, which has no groups."""

    degree: int
    expand: int
    groups: int
    heads: int
    rope: Literal[1, 2] | None = None
    bias: bool = False
    fused: bool = True

    @property
    def width(self) -> int:
        return self.expand * DIM

    @property
    def num_gates(self) -> int:
        return self.width if self.heads == 1 else self.heads


LAYERS = {
    "plain": Layer(2, 2, 1, 1),
    "heads": Layer(3, 1, 1, 8),
    "bias": Layer(1, 3, 1, 4, bias=True),
    "groups": Layer(2, 2, 2, 4, bias=True, fused=False),
    "groups without bias": Layer(5, 2, 4, 1, fused=False),
    "older": Layer(2, 2, 1, 4, bias=True, fused=False),  # po_proj is a matrix
    "1-D": Layer(2, 2, 1, 1, rope=1),
    "1-D heads": Layer(3, 2, 1, 8, rope=1),
    "1-D heads of odd width": Layer(2, 3, 1, 16, rope=1),
    "1-D groups": Layer(2, 1, 2, 4, rope=1, fused=False),
    "2-D": Layer(3, 1, 1, 1, rope=2),
    "2-D heads": Layer(1, 2, 1, 8, rope=2, bias=True),
    "2-D groups": Layer(2, 2, 4, 4, rope=2, fused=False),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def tables(layer: Layer, base: float = 10_000.0) -> dict[str, Tensor]:
    """The buffers: for one axis frequencies of all pairs, for two those of half of the pairs, each axis the same."""
    if layer.rope is None:
        return {}
    pairs = layer.width // 2 // layer.rope
    # In their order of operations: a frequency that differs in its last bit shows at 1e-8.
    frequencies = 1 / base ** (torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = torch.arange(SIDE * SIDE if layer.rope == 1 else SIDE, dtype=torch.float32)[:, None] * frequencies
    prefixes = ["freqs"] if layer.rope == 1 else ["row", "col"]
    return {f"{prefix}_{name}": getattr(angles, name)() for prefix in prefixes for name in ("cos", "sin")}


def state_dict(layer: Layer, base: float = 10_000.0) -> dict[str, Tensor]:
    width, gates = layer.width, layer.num_gates
    weights = {"po_coeff": normal(width, layer.degree), "ag_proj.weight": normal(DIM, width), **tables(layer, base)}
    if layer.fused:
        weights |= {"qc_proj.weight": normal(width + gates, DIM), "se_bias": normal(gates)}
    else:
        weights |= {"se_proj.weight": normal(gates, DIM, seed=1), "se_proj.bias": normal(gates)}
        kernel = (1,) * (layer.groups > 1)  # a convolution has groups, and a linear map has none
        weights["po_proj.weight"] = normal(width, DIM // layer.groups, *kernel)
        if layer.bias:
            weights["po_proj.bias"] = normal(width, seed=2)
    if layer.bias:
        weights["ag_proj.bias"] = normal(DIM, seed=3)
    return weights


def turned(x: Tensor, weights: Mapping[str, Tensor], layer: Layer, positions: Tensor) -> Tensor:
    """Turn x (b n W or S) by rows of the tables; the gates of heads take every so many columns of them."""
    pairs = x.shape[2] // 2 // positions.shape[1]
    step, parts = 1, []
    if x.shape[2] != layer.width:
        step = layer.width // layer.heads // (3 - positions.shape[1])  # head_width // 2, or head_width for two axes
    prefixes = ["freqs"] if positions.shape[1] == 1 else ["row", "col"]
    for prefix, block, places in zip(prefixes, x.chunk(len(prefixes), dim=-1), positions.unbind(-1), strict=True):
        cos, sin = (weights[f"{prefix}_{name}"][places][:, ::step][:, :pairs].to(x.dtype) for name in ("cos", "sin"))
        first, second = block.chunk(2, dim=-1)
        parts += [first * cos - second * sin, first * sin + second * cos]
    return torch.cat(parts, dim=-1)


def official(
    weights: Mapping[str, Tensor], layer: Layer, x: Tensor, context: Tensor, mask: Mask, positions: list[Tensor | None]
) -> Tensor:
    """The authors' forward pass, with a dense mask; positions of x and of the context."""
    if layer.fused:
        u = F.linear(context, weights["qc_proj.weight"][: layer.width])
        logits = F.linear(x, weights["qc_proj.weight"][layer.width :], weights["se_bias"])
    else:
        kernel = weights["po_proj.weight"].reshape(layer.width, -1, 1)
        u = F.conv1d(context.mT, kernel, weights.get("po_proj.bias"), groups=layer.groups).mT
        logits = F.linear(x, weights["se_proj.weight"], weights["se_proj.bias"])
    v = F.leaky_relu(u, 0.01).clip(-0.1, 6)
    powers = torch.stack([v.pow(exponent + 1) for exponent in range(layer.degree)])
    h, s = torch.einsum("kbnd,dk->bnd", powers, weights["po_coeff"]), F.hardsigmoid(logits)
    if positions[0] is not None and positions[1] is not None:
        h, s = turned(h, weights, layer, positions[1]), turned(s, weights, layer, positions[0])
    reads = dense_mask(mask, BATCH, x.shape[1], context.shape[1], x.device).to(h.dtype)
    mean = reads @ h / reads.sum(2, keepdim=True)
    gates = s.repeat_interleave(layer.width // layer.num_gates, dim=2)
    return F.linear(gates * mean, weights["ag_proj.weight"], weights.get("ag_proj.bias"))


def places(length: int, layer: Layer) -> Tensor | None:
    at = torch.arange(length) * 2
    return {None: None, 1: at[:, None], 2: torch.stack([at // SIDE, at % SIDE], dim=-1)}[layer.rope]


PADDING = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
PATTERN = torch.rand(BATCH, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.5
PATTERN[..., 0] = True  # the authors divide by the number of tokens read, which must not be 0
MASKS: dict[str, Mask] = {"none": None, "padding": PADDING, "pattern": PATTERN, "causal": "causal"}
# Parameters of ours, and those of theirs that hold the same numbers.
SAME = {"coefficients": "po_coeff", "output.weight": "ag_proj.weight", "output.bias": "ag_proj.bias"}
SAME_APART = {"projection.weight": "po_proj.weight", "projection.bias": "po_proj.bias"}
SAME_APART |= {"gate.weight": "se_proj.weight", "gate.bias": "se_proj.bias"}


def assert_same_gradients(ours: PoM, theirs: Mapping[str, Tensor], layer: Layer) -> None:
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    if layer.fused:
        fused = torch.cat([found["projection.weight"], found["gate.weight"]])  # type: ignore[list-item]
        torch.testing.assert_close(fused, theirs["qc_proj.weight"].grad, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found["gate.bias"], theirs["se_bias"].grad, rtol=1e-10, atol=1e-11)
    for name, other in {**SAME, **({} if layer.fused else SAME_APART)}.items():
        if other in theirs:
            expected = theirs[other].grad
            assert expected is not None
            torch.testing.assert_close(found[name], expected.reshape(found[name].shape), rtol=1e-10, atol=1e-11)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_official_weights_give_the_official_output_and_gradients(name: str, case: str) -> None:
    layer, mask = LAYERS[name], MASKS[case]
    weights = state_dict(layer)
    mixer = PoM.from_official(weights)
    theirs = {key: tensor.clone().requires_grad_(key not in tables(layer)) for key, tensor in weights.items()}
    x, same = normal(BATCH, TOKENS, DIM).requires_grad_(), normal(BATCH, TOKENS, DIM).requires_grad_()
    positions = places(TOKENS, layer)
    y = mixer(x, mask=mask, positions=positions)
    expected = official(theirs, layer, same, same, mask, [positions, positions])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = normal(*y.shape, seed=4)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-10, atol=1e-11)
    assert_same_gradients(mixer, theirs, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_official_weights_across_sequences(name: str) -> None:
    layer = LAYERS[name]
    weights = state_dict(layer)
    mixer = PoM.from_official(weights, degree=layer.degree, heads=layer.heads, rope=layer.rope)
    x, context = normal(BATCH, QUERIES, DIM), normal(BATCH, TOKENS, DIM)
    positions = [places(QUERIES, layer), places(TOKENS, layer)]
    expected = official(weights, layer, x, context, PADDING, positions)
    y = mixer(x, context, PADDING, positions=positions[0], context_positions=positions[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert mixer.form.degree == layer.degree
    assert mixer.form.heads == layer.heads
    assert mixer.form.rope == layer.rope
    weights["po_coeff"].zero_()
    assert mixer.coefficients is not None
    assert bool(mixer.coefficients.any()), "the layer must own its weights"


@pytest.mark.parametrize("name", ["1-D heads", "2-D"])
def test_parameters_alone_need_the_axes(name: str) -> None:
    """Averages hold no tables."""
    layer = LAYERS[name]
    weights = state_dict(layer)
    alone = {key: tensor for key, tensor in weights.items() if key not in tables(layer)}
    x, positions = normal(BATCH, TOKENS, DIM), places(TOKENS, layer)
    y = PoM.from_official(alone, rope=layer.rope)(x, positions=positions)
    assert torch.equal(y, PoM.from_official(weights)(x, positions=positions))
    assert PoM.from_official(alone).form.rope is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["1-D heads", "2-D groups"])
def test_a_layer_that_was_cast_is_read(name: str, dtype: torch.dtype) -> None:
    """The tables of such a layer are rounded; ours are not, for they are computed from the positions."""
    mixer = PoM.from_official({key: tensor.to(dtype) for key, tensor in state_dict(LAYERS[name]).items()})
    assert {parameter.dtype for parameter in mixer.parameters()} == {dtype}
    assert mixer.form.rope == LAYERS[name].rope


# --- layers that do not fit ------------------------------------------------------------------------------------------


def without(layer: Layer, *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict(layer).items() if name not in names}


PLAIN, GROUPS, ROWS, LINE = LAYERS["heads"], LAYERS["groups"], LAYERS["2-D"], LAYERS["1-D"]
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "degree": (state_dict(PLAIN), {"degree": 2}, "degree 2 was given, and the tensors have 3"),
    "degree 0": (state_dict(PLAIN), {"degree": 0}, "degree 0 was given, and the tensors have 3"),
    "heads": (state_dict(PLAIN), {"heads": 4}, "heads 4 was given, and the tensors have 8"),
    "no heads": (state_dict(LAYERS["plain"]), {"heads": 8}, "heads 8 was given, and the tensors have 1"),
    "axes": (state_dict(ROWS), {"rope": 1}, "rope 1 was given, and the tensors have 2 axes"),
    "three axes": (state_dict(PLAIN), {"rope": 3}, "rope 3 was given, and the tensors have 1 or 2 axes"),
    "another base": (state_dict(ROWS, base=500.0), {}, r"row_cos must hold the frequencies .*, got others"),
    "a table is missing": (without(ROWS, "col_sin"), {}, r"expected the tables \['col_cos', 'col_sin'\], got keys"),
    "one table of a pair": (without(LINE, "freqs_cos"), {}, r"expected the tables \['freqs_cos', 'freqs_sin'\], got"),
    "a table of another width": (
        {**state_dict(LINE), "freqs_sin": torch.zeros(SIDE * SIDE, 3)},
        {},
        r"freqs_sin has shape \(36, 3\), expected \(36, 16\)",
    ),
    "both kinds of tables": ({**state_dict(LINE), **tables(ROWS)}, {}, "expected keys"),
    "nothing": ({}, {}, "expected a matrix po_coeff, got the keys"),
    "no output map": (without(PLAIN, "ag_proj.weight"), {}, "expected a matrix ag_proj.weight, got the keys"),
    "no bias of gates": (without(PLAIN, "se_bias"), {}, "expected keys .*se_bias.*, got"),
    "a key too many": ({**state_dict(PLAIN), "more": torch.zeros(1)}, {}, "expected keys .* got .*more"),
    "coefficients as a vector": (
        {**state_dict(PLAIN), "po_coeff": torch.zeros(16)},
        {},
        r"matrix po_coeff, got \(16,\)",
    ),
    "coefficients of another width": (
        {**state_dict(PLAIN), "po_coeff": torch.zeros(24, 3)},
        {},
        "dim 16 divides, got 24",
    ),
    "output map of another width": (
        {**state_dict(PLAIN), "ag_proj.weight": torch.zeros(16, 32)},
        {},
        r"ag_proj.weight has shape \(16, 32\), expected \(16, 16\)",
    ),
    "fused map without gates": (
        {**state_dict(PLAIN), "qc_proj.weight": torch.zeros(16, 16)},
        {},
        r"qc_proj.weight has shape \(16, 16\), expected \(17, 16\)",
    ),
    "fused map of another width": (
        {**state_dict(PLAIN), "qc_proj.weight": torch.zeros(24, 8)},
        {},
        r"qc_proj.weight has shape \(24, 8\), expected \(24, 16\)",
    ),
    "heads that do not divide": (
        {**state_dict(PLAIN), "qc_proj.weight": torch.zeros(19, 16), "se_bias": torch.zeros(3)},
        {},
        "heads: 3 do not divide the 16 channels",
    ),
    "a longer kernel": (
        {**state_dict(GROUPS), "po_proj.weight": torch.zeros(32, 8, 3)},
        {},
        r"po_proj.weight has shape \(32, 8, 3\), expected \(32, 8, 1\)",
    ),
    "groups that do not divide": (
        {**state_dict(GROUPS), "po_proj.weight": torch.zeros(32, 5, 1)},
        {},
        r"po_proj.weight has shape \(32, 5, 1\), expected \(32, 16, 1\)",
    ),
    "gates of another width": (
        {**state_dict(GROUPS), "se_proj.weight": torch.zeros(4, 8)},
        {},
        r"se_proj.weight has shape \(4, 8\), expected \(4, 16\)",
    ),
    "a bias of another width": (
        {**state_dict(GROUPS), "po_proj.bias": torch.zeros(3)},
        {},
        r"po_proj.bias has shape \(3,\), expected \(32,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_layers_that_do_not_fit_are_refused(case: str) -> None:
    weights, arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        PoM.from_official(weights, **arguments)
