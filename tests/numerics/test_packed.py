"""Packed samples beside batches of one shape each: predictions, loss and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pomscale.layers.units
from pomscale.base.condition import PackedText, Text
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.layers import Units, gate_units, modulate, modulate_units
from pomscale.models import make_model

COEFFICIENTS = {"kind": "pom", "form": "coefficients", "heads": 8, "degree": 3, "rope": True}
PICTURES = ((3, 4, 6), (3, 2, 2), (3, 6, 4), (3, 2, 10))
CLIPS = ((3, 4, 2, 6), (3, 2, 2, 6), (3, 4, 6), (3, 1, 2, 4), (3, 6, 4, 2))
SIZES = (3, 1, 2, 1, 2)  # samples of each shape

IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "coefficients": {"mixer": COEFFICIENTS, "norm": "rms", "ffn": "swiglu"},
    "in-context": {
        "mixer": [COEFFICIENTS, "attention", "pom"], "in_context": {"tokens": 3, "start": 1}, "num_heads": 2,
        "positions": "sincos_integer", "time_embedding": "data_fraction", "patch_embedding": {"bottleneck": 5},
    },
    "dropout": {"mixer": ["attention", "pom", "pom"], "num_heads": 2, "dropout": {"rate": 0.3}},
}  # fmt: skip
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "cross": {"mixer": [COEFFICIENTS, "attention", "pom"], "num_heads": 2, "dropout": {"rate": 0.2}},
    "in-context": {
        "mixer": [COEFFICIENTS, "attention", "pom"], "num_heads": 2, "text": "in_context", "text_start": 1,
        "norm": "rms", "ffn": "swiglu",
    },
}  # fmt: skip
VIDEO_MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"temporal": "block_causal", "mixer": COEFFICIENTS},
    "causal-attention": {
        "temporal": "block_causal", "mixer": ["attention", "pom", COEFFICIENTS], "num_heads": 2,
        "dropout": {"rate": 0.2},
    },
}  # fmt: skip


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_same(
    one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]], tolerance: float
) -> None:
    for packed, plain in zip(one[0], other[0], strict=True):
        assert packed.shape == plain.shape
        torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)
    for name, gradient in other[1].items():
        scale = gradient.abs().max().clamp_min(1e-30)
        assert ((one[1][name] - gradient).abs().max() / scale).item() < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_packed_pictures_equal_batches_of_one_size(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config = ImageModelConfig.model_validate(
        {"latent_shape": (3, 4, 6), "num_classes": 5, "dim": 16, "depth": 3, **IMAGE_MODELS[name]}
    )
    model = randomized(make_model(config)).to(dtype)
    torch.manual_seed(0)
    batches = [
        (random(n, *shape, dtype=dtype), torch.rand(n), torch.randint(6, (n,)), torch.randint(2**31, (n,)))
        for n, shape in zip(SIZES, PICTURES, strict=False)
    ]
    weights = [random(*latents.shape, dtype=dtype) for latents, *_ in batches]

    def outcome(predictions: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        sum((p * w).sum() for p, w in zip(predictions, weights, strict=True)).backward()  # type: ignore[union-attr]
        return list(predictions), gradients(model)

    plain = outcome([model(x, t, c, dropout_seeds=seeds) for x, t, c, seeds in batches])
    latents, *others = zip(*batches, strict=True)
    t, classes, seeds = (torch.cat(parts) for parts in others)
    assert_same(outcome(model(list(latents), t, classes, dropout_seeds=seeds)), plain, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_packed_pictures_of_texts_equal_batches_of_one_size(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config = ImageModelConfig.model_validate(
        {"latent_shape": (3, 4, 6), "text_dim": 7, "dim": 16, "depth": 3, **TEXT_MODELS[name]}
    )
    model = randomized(make_model(config)).to(dtype)
    torch.manual_seed(0)
    batches = [
        (random(n, *shape, dtype=dtype), torch.rand(n), random_texts(n, 5, dtype), torch.randint(2**31, (n,)))
        for n, shape in zip(SIZES, PICTURES, strict=False)
    ]
    weights = [random(*latents.shape, dtype=dtype) for latents, *_ in batches]

    def outcome(predictions: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        sum((p * w).sum() for p, w in zip(predictions, weights, strict=True)).backward()  # type: ignore[union-attr]
        return list(predictions), gradients(model)

    plain = outcome(
        [model(x, t, c, dropout_seeds=None if config.dropout is None else seeds) for x, t, c, seeds in batches]
    )
    latents, times, texts, seeds = zip(*batches, strict=True)
    of_dropout = None if config.dropout is None else torch.cat(seeds)
    packed = model(list(latents), torch.cat(times), packed_texts(texts), dropout_seeds=of_dropout)
    assert_same(outcome(packed), plain, tolerance)
    with pytest.raises(ValueError, match="takes packed texts, and not class ids"):
        model(list(latents), torch.cat(times), torch.zeros(sum(SIZES[:4]), dtype=torch.int64))


def random_texts(count: int, longest: int, dtype: torch.dtype) -> Text:
    """Return texts of 0 to `longest` tokens of width 7, an empty one among two."""
    lengths = torch.randint(0, longest + 1, (count,))
    lengths[0] = 0 if count == 2 else lengths[0]
    return Text(random(count, longest, 7, dtype=dtype), torch.arange(longest) < lengths[:, None])


def packed_texts(texts: Sequence[Text]) -> PackedText:
    return PackedText(
        torch.cat([text.embeddings[text.mask] for text in texts]),
        tuple(int(n) for text in texts for n in text.mask.sum(1)),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("per_frame_group", [False, True])
@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_packed_clips_and_pictures_equal_batches_of_one_shape(
    name: str, per_frame_group: bool, dtype: torch.dtype, tolerance: float
) -> None:
    if per_frame_group and name == "plain":
        pytest.skip("a time per frame group needs the block-causal mask")
    config = VideoModelConfig.model_validate(
        {
            "kind": "video", "latent_shape": (3, 6, 4, 6), "text_dim": 7, "dim": 16, "depth": 3,
            **VIDEO_MODELS[name],
        }
    )  # fmt: skip
    model = randomized(make_model(config)).to(dtype)
    torch.manual_seed(1)
    batches = []
    for n, shape in zip(SIZES, CLIPS, strict=True):
        groups = max(shape[1] // 2, 1) if len(shape) == 4 else 1
        t = torch.rand(n, groups) if per_frame_group else torch.rand(n)
        text = random_texts(n, 5, dtype)
        batches.append((random(n, *shape, dtype=dtype), t, text, torch.randint(4, (n,)), torch.randint(2**31, (n,))))
    weights = [random(*latents.shape, dtype=dtype) for latents, *_ in batches]

    def outcome(predictions: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        sum((p * w).sum() for p, w in zip(predictions, weights, strict=True)).backward()  # type: ignore[union-attr]
        return list(predictions), gradients(model)

    plain = outcome([model(x, t, text, start, dropout_seeds=seeds) for x, t, text, start, seeds in batches])
    latents, times, texts, starts, seeds = zip(*batches, strict=True)
    packed_text = packed_texts(texts)
    t = torch.cat([part.flatten() for part in times])
    predictions = model(list(latents), t, packed_text, torch.cat(starts), dropout_seeds=torch.cat(seeds))
    assert_same(outcome(predictions), plain, tolerance)


@pytest.mark.parametrize("gathered", [False, True], ids=["runs", "gathered"])
@pytest.mark.parametrize("lengths", [(3, 3, 0, 5, 5, 1), tuple(range(20))])
def test_units_are_modulated_as_their_tokens_alone(
    lengths: tuple[int, ...], gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pomscale.layers.units, "_gathers", lambda x, units: gathered)
    torch.manual_seed(2)
    units = Units(lengths)
    x = random(1, sum(lengths), 4).requires_grad_()
    shift, scale = (random(1, len(lengths), 4).requires_grad_() for _ in range(2))
    dy = random(1, sum(lengths), 4)
    of_token = units.unit_of_tokens(x.device)
    spread = [vectors[:, of_token] for vectors in (shift, scale)]
    for fast, naive in (
        (modulate_units(x, shift, scale, units), modulate(x, *spread)),
        (gate_units(scale, x, units), spread[1] * x),
    ):
        torch.testing.assert_close(fast, naive, rtol=1e-12, atol=1e-12)
        inputs = (x, scale)
        gradients_of = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (fast, naive)]
        for found, wanted in zip(*gradients_of, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *tensors: modulate_units(*tensors, units), (x, shift, scale))
