"""Layers that a trunk may choose, against re-statements of their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.layers import (
    Attention,
    BottleneckPatchEmbedding,
    DataFractionEmbedding,
    Dropout,
    InContextTokens,
    RMSNorm,
    SwiGLU,
    grid_positions,
    norm,
    patchify,
    sincos_positions_2d,
)
from pomscale.ops.pom import BlockCausal

CPU = torch.device("cpu")


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / (x.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-6).sqrt()


@pytest.mark.parametrize("shape", [(7, 5), (3, 11, 5), (3, 11, 2, 5)], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 2**18], ids=str)
def test_rms_norm_and_its_gradients(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_CHUNK", chunk)
    layer = RMSNorm(5).double()
    torch.nn.init.normal_(layer.weight)
    x, upstream = torch.randn(2, *shape, dtype=torch.float64)
    x.requires_grad_()
    inputs = [x, layer.weight]
    found, expected = layer(x), rms(x, layer.weight)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_computed_in_fp32(dtype: torch.dtype) -> None:
    """Rounding is that of the operands and of the result; squares of 300 do not overflow a small dtype's digits."""
    layer = RMSNorm(64).to(dtype)
    x = (300 * torch.randn(4, 9, 64)).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    exact = rms(x.double(), layer.weight.double())
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    ours, theirs = (
        torch.autograd.grad(out.double().square().sum(), x)[0].double() for out in (y[..., :3], exact[..., :3])
    )
    assert (ours - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


def test_rms_norm_of_views_and_compiled_is_the_same() -> None:
    layer, wide = RMSNorm(6), torch.randn(2, 7, 24)
    view = wide[..., 6:12].unflatten(-1, (1, 6))
    torch.testing.assert_close(layer(view), layer(view.contiguous()))
    torch.testing.assert_close(layer(view), F.rms_norm(view, (6,), layer.weight, 1e-6))
    later = wide[:, 3:, :6]
    torch.testing.assert_close(layer(later), F.rms_norm(later, (6,), layer.weight, 1e-6))


def swiglu(x: Tensor, layer: SwiGLU) -> Tensor:
    width = layer.contract.in_features
    gate, value = (
        x @ layer.expand.weight[rows].T + layer.expand.bias[rows] for rows in (slice(width), slice(width, None))
    )
    return (gate * torch.sigmoid(gate) * value) @ layer.contract.weight.T + layer.contract.bias


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 1)], ids=str)
def test_swiglu_and_its_gradients(shape: tuple[int, ...]) -> None:
    layer, x = SwiGLU(6, 5).double(), torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    upstream, inputs = torch.randn_like(x), [x, *layer.parameters()]
    found = [layer(x), layer(x, drop=lambda hidden: hidden)]  # the second is layered
    expected = swiglu(x, layer)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
        for ours, theirs in zip(torch.autograd.grad(y, inputs, upstream), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_computed_again_equals_the_layers_in_the_dtype_of_training(dtype: torch.dtype) -> None:
    layer, x = SwiGLU(24, 36).to(dtype), torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    upstream, inputs = torch.randn_like(x), [x, *layer.parameters()]
    ours, theirs = layer(x), layer(x, drop=lambda hidden: hidden)
    assert torch.equal(ours, theirs)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max())


@pytest.mark.parametrize("frozen", ["contract.weight", "contract.bias", "expand"])
def test_swiglu_with_frozen_parameters(frozen: str) -> None:
    layer, x = SwiGLU(6, 5).double(), torch.randn(3, 6, dtype=torch.float64)
    trained = {name: p for name, p in layer.named_parameters() if not name.startswith(frozen)}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    gradients = (torch.autograd.grad(y.square().sum(), list(trained.values())) for y in (layer(x), swiglu(x, layer)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_swiglu_keeps_what_its_first_map_gives_and_no_hidden_features() -> None:
    layer, x = SwiGLU(6, 4), torch.randn(2, 5, 6)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert (2, 5, 8) in kept
    assert not {(2, 5, 4), (10, 4)} & set(kept)


def test_swiglu_calls_a_map_that_somebody_watches() -> None:
    layer, calls = SwiGLU(6, 5), []
    layer.contract.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, 6))
    assert calls == [1]


def test_a_bottleneck_is_a_convolution_and_a_linear_map() -> None:
    embedding, pictures = BottleneckPatchEmbedding(3, 8, 5, (1, 2, 2)).double(), torch.randn(2, 3, 6, 4).double()
    kernel = embedding.reduce.weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
    reduced = F.conv2d(pictures, kernel, stride=2).flatten(2).transpose(1, 2)
    expected = reduced @ embedding.expand.weight.T + embedding.expand.bias
    torch.testing.assert_close(embedding(pictures), expected)
    torch.testing.assert_close(embedding(pictures, slice(2, 5)), expected[:, 2:5])
    torch.testing.assert_close(embedding(pictures), embedding.expand(embedding.reduce(patchify(pictures, 2))))
    with pytest.raises(ValueError, match=r"latents of \(1, 6, 5\) cannot be cut into patches of \(1, 2, 2\)"):
        embedding(torch.randn(2, 3, 6, 5))


def test_the_time_of_jit_is_one_minus_ours() -> None:
    layer = DataFractionEmbedding(8)
    features: list[Tensor] = []
    layer.expand.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    layer(torch.tensor([0.75, 0.0]))
    angles = [0.25 * 10000 ** (-i / 128) for i in range(128)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    torch.testing.assert_close(features[0][0], expected)
    assert features[0][1, 128].item() == pytest.approx(math.sin(1.0))  # data: their time is 1


def test_time_of_jit_is_resolved_in_fp32_under_bf16_weights() -> None:
    nearby = DataFractionEmbedding(256).bfloat16()(torch.tensor([0.5, 0.52]))
    assert nearby.dtype == torch.bfloat16
    assert not torch.equal(nearby[0], nearby[1])


def test_sincos_of_integers() -> None:
    dim, height, width = 12, 3, 40
    grid = sincos_positions_2d(height, width, dim, CPU, torch.float32, integer=True).view(height, width, dim)
    row, column = 2, 37
    expected = [wave(n * 10000 ** (-i / 3)) for n in (column, row) for wave in (math.sin, math.cos) for i in range(3)]
    torch.testing.assert_close(grid[row, column], torch.tensor(expected), rtol=0, atol=1e-5)


def test_tokens_in_context() -> None:
    layer = InContextTokens(3, 4)
    of_class = torch.randn(2, 4)
    assert torch.equal(layer(of_class)[1, 2], of_class[1] + layer.positions[2])


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_sets_its_share_to_zero_and_scales_the_rest() -> None:
    layer, x = Dropout(0.2, 7), torch.randn(4, 50, 200)
    seeds = torch.tensor([0, 1, 2**31 - 1, 12345])
    y = layer(x, seeds)
    dropped = y == 0
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        share = dropped.float().mean(axes)
        spread = math.sqrt(0.2 * 0.8 * share.numel() / x.numel())
        assert ((share - 0.2).abs() < 5 * spread).all()
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.8)
    assert layer(x, None) is x
    # Samples, layers and neighbours are independent.
    others = (dropped.roll(1, 0), Dropout(0.2, 8)(x, seeds) == 0, dropped.roll(1, 2), dropped.roll(1, 1))
    for other in others:
        assert float((dropped & other).float().mean()) == pytest.approx(0.04, abs=0.006)


def test_dropout_is_that_of_the_sample_wherever_its_tokens_are() -> None:
    layer, x, seeds = Dropout(0.5, 3), torch.ones(3, 20, 6), torch.tensor([5, 9, 13])
    whole = layer(x, seeds)
    assert torch.equal(layer(x[1:2], seeds[1:2]), whole[1:2])
    assert torch.equal(layer(x[:, 7:15], seeds, first_token=7), whole[:, 7:15])


# --- attention with rotary positions and norms -----------------------------------------------------------------------


def rotary_attention() -> Attention:
    torch.manual_seed(0)
    layer = Attention(24, 2, qk_norm=True, rope=3).double()
    for module in (layer.query_norm, layer.key_norm):
        assert isinstance(module, RMSNorm)
        torch.nn.init.normal_(module.weight)
    return layer


def test_attention_depends_on_relative_positions_alone() -> None:
    layer, x = rotary_attention(), torch.randn(2, 12, 24, dtype=torch.float64)
    positions = grid_positions(2, 3, torch.arange(2))
    y = layer(x, positions=positions)
    torch.testing.assert_close(layer(x, positions=positions + torch.tensor([5, 2, 9])), y, rtol=1e-5, atol=1e-6)
    for axis in range(3):
        moved = positions.clone()
        moved[-1, axis] += 1
        assert (layer(x, positions=moved) - y).abs().max() > 1e-4


def test_steps_of_rotary_attention_equal_the_block_causal_full_pass() -> None:
    layer, x = rotary_attention(), torch.randn(2, 18, 24, dtype=torch.float64)
    positions, outputs, state = grid_positions(2, 3, torch.tensor([[0, 1, 2], [4, 5, 6]])), [], None
    for tokens in (slice(0, 6), slice(6, 18)):
        y, state = layer.step(x[:, tokens], state, BlockCausal(6), positions[:, tokens])
        outputs.append(y)
    full = layer(x, mask=BlockCausal(6), positions=positions)
    torch.testing.assert_close(torch.cat(outputs, dim=1), full, rtol=1e-10, atol=1e-12)


def test_cross_attention_has_positions_of_its_own() -> None:
    layer, x = rotary_attention(), torch.randn(1, 6, 24, dtype=torch.float64)
    positions = grid_positions(2, 3, torch.arange(1))
    cross = layer(x[:, 2:4], x, positions=positions[2:4], context_positions=positions)
    torch.testing.assert_close(cross, layer(x, positions=positions)[:, 2:4])


def test_positions_that_do_not_fit_are_refused() -> None:
    layer, x = rotary_attention(), torch.randn(1, 6, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="a mixer with rope=3 needs integers"):
        layer(x)
    with pytest.raises(ValueError, match="expected None for a mixer without rope"):
        Attention(24, 2).double()(x, positions=torch.zeros(6, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="rope=2 needs a multiple of 4 of channels of a head, got 6"):
        Attention(24, 4, rope=2)
