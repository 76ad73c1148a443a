"""The alignment loss: beside REPA's formula token by token, in both networks, and in the loss of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pomscale.base.condition import Text
from pomscale.config.engine import OptimizerConfig
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import AlignmentLossConfig, TrainRecipe
from pomscale.data.loader import MicroBatch
from pomscale.diffusion.alignment import alignment_loss
from pomscale.diffusion.objectives import FlowMatching, per_sample_loss
from pomscale.engine.matrices import block_matrices
from pomscale.engine.optimizers import build_optimizer
from pomscale.models import init_weights, make_model
from pomscale.models.image import DiPoM
from pomscale.plan.model_cost import num_parameters, projection_flops, training_flops
from pomscale.shards.schema import Normalization
from pomscale.training.loss import TrainBatch, aligned_features, share_of_loss

PICTURES: dict[str, Any] = {"latent_shape": (3, 6, 10), "num_classes": 5, "patch_size": 2, "dim": 20, "depth": 3}
PICTURES |= {"num_heads": 2, "alignment": {"block": 2, "dim": 7, "hidden": 9}}
CLIPS: dict[str, Any] = {**PICTURES, "kind": "video", "latent_shape": (3, 4, 6, 10), "text_dim": 5}
del CLIPS["num_classes"]
CPU = torch.device("cpu")


def naive(projected: Tensor, features: Tensor) -> Tensor:
    """REPA's projection loss of one sample: each vector divided by its own length, by plain loops."""
    total = projected.new_zeros(())
    for ours, theirs in zip(projected, features, strict=True):
        dot = sum(a * b for a, b in zip(ours, theirs, strict=True))
        lengths = [sum(a * a for a in vector) ** 0.5 for vector in (ours, theirs)]
        total = total - dot / (lengths[0] * lengths[1])
    return total / len(projected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    projected = (3 * torch.randn(3, 5, 7, generator=generator)).to(dtype)
    features = torch.randn(3, 5, 7, generator=generator).half()
    ours, theirs = projected.clone().requires_grad_(), projected.double().requires_grad_()
    loss, expected = (
        alignment_loss(ours, features),
        torch.stack([naive(row, of) for row, of in zip(theirs, features.double(), strict=True)]),
    )
    weights = torch.tensor([1.0, 0.5, 2.0])
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]


def test_features_of_zeros_count_nothing() -> None:
    """A bad sample has such features; nothing of it may become nan."""
    projected = torch.randn(1, 4, 3, requires_grad=True)
    loss = alignment_loss(projected, torch.zeros(1, 4, 3).half())
    loss.sum().backward()
    assert loss.item() == 0
    assert projected.grad is not None
    assert not projected.grad.any()


def conditioned(config: ImageModelConfig | VideoModelConfig, size: int) -> tuple[Tensor, Tensor, Any]:
    x, t = torch.randn(size, *config.latent_shape), torch.rand(size)
    if isinstance(config, ImageModelConfig):
        return x, t, torch.arange(size) % 5
    return x, t, Text(torch.randn(size, 4, 5), torch.ones(size, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "config",
    [
        ImageModelConfig(**PICTURES),
        ImageModelConfig(**PICTURES, in_context={"tokens": 3, "start": 1}),
        VideoModelConfig(**CLIPS),
    ],
    ids=["pictures", "in context", "clips"],
)
def test_the_tokens_after_the_block_are_projected(config: ImageModelConfig | VideoModelConfig) -> None:
    model = make_model(config)
    init_weights(model, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    inputs, hidden = conditioned(config, 3), []
    model.blocks()[1].register_forward_hook(lambda module, arguments, result: hidden.append(result))
    prediction, projected = model(*inputs, num_aligned=2)
    assert projected.shape == (2, config.num_tokens, 7)
    maps = [model.get_submodule(f"alignment.{name}") for name in ("first", "second", "third")]
    x = hidden[0][:2, -config.num_tokens :]
    for number, map_ in enumerate(maps):
        x = x @ map_.weight.T + map_.bias  # type: ignore[operator, union-attr]
        x = x * torch.sigmoid(x) if number < 2 else x
    torch.testing.assert_close(projected, x)
    assert prediction.equal(model(*inputs))


def test_without_aligned_samples_the_projection_has_gradients_of_zeros() -> None:
    config = ImageModelConfig(**PICTURES)
    model = make_model(config)
    init_weights(model, 3)
    with FlopCounterMode(display=False) as counter:
        prediction, projected = model(*conditioned(config, 2), num_aligned=0)
    with FlopCounterMode(display=False) as plain:
        model(*conditioned(config, 2))
    assert counter.get_total_flops() == plain.get_total_flops()
    (prediction.sum() + alignment_loss(projected, torch.zeros(0, config.num_tokens, 7)).sum()).backward()
    gradients = [model.get_parameter(f"alignment.{name}.weight").grad for name in ("first", "second", "third")]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_cost_of_the_projection_is_what_runs() -> None:
    config = ImageModelConfig(**PICTURES)
    model, plain = make_model(config), config.model_copy(update={"alignment": None})
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(*conditioned(config, 3), num_aligned=3)
    with FlopCounterMode(display=False) as without:
        model(*conditioned(config, 3))
    assert counter.get_total_flops() - without.get_total_flops() == 3 * projection_flops(config)
    assert training_flops(config) - training_flops(plain) == 3 * projection_flops(config)


def test_adamw_steps_the_projection_with_decay_and_other_weights_are_those_of_v1() -> None:
    config = ImageModelConfig(**PICTURES)
    model, plain = make_model(config), make_model(config.model_copy(update={"alignment": None}))
    init_weights(model, 3)
    init_weights(plain, 3)
    assert all(parameter.equal(model.get_parameter(name)) for name, parameter in plain.named_parameters())
    assert "alignment" not in plain.config.model_dump()
    assert not any(name.startswith("alignment") for name in block_matrices(model))
    decayed = build_optimizer(model, OptimizerConfig()).param_groups[0]["params"]
    assert any(parameter is model.get_parameter("alignment.second.weight") for parameter in decayed)


def test_training_adds_the_loss_of_samples_before_the_end_of_alignment() -> None:
    config = ImageModelConfig(**PICTURES)
    model = DiPoM(config)
    init_weights(model, 3)
    latents, t, classes = conditioned(config, 4)
    positions, weights = torch.arange(6, 10), torch.tensor([1.0, 0.0, 1.0, 1.0])  # the second sample is bad
    features = torch.randn(4, config.num_tokens, 7).half()
    read = MicroBatch(latents, classes, None, None, positions, weights, (), features)
    kept = aligned_features(AlignmentLossConfig(until_samples=9), read)
    assert kept.equal(features[:3])
    assert aligned_features(AlignmentLossConfig(until_samples=6), read).shape == (0, *features.shape[1:])
    assert aligned_features(AlignmentLossConfig(), read) is features

    eps = torch.randn_like(latents)
    batch = TrainBatch(latents, eps, t, classes, None, weights, (), features=kept)
    figures = share_of_loss(
        FlowMatching(), Normalization((0.0,) * 3, (1.0,) * 3), 8, CPU, None, model, batch, alignment_weight=0.5
    )
    diffusion = (per_sample_loss(FlowMatching(), model, latents, eps, t, classes) * weights).sum() / 8
    _, projected = model(per_sample_input(latents, eps, t), t, classes, num_aligned=3)
    alignment = (naive(projected[0], features[0].float()) + naive(projected[2], features[2].float())) / 8
    torch.testing.assert_close(
        figures, torch.stack([diffusion + alignment / 2, diffusion, alignment, torch.tensor(2 / 8)])
    )


def per_sample_input(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps


RECIPE: dict[str, Any] = {
    "kind": "train",
    "name": "aligned",
    "codec": {"name": "pixel"},
    "data": {"path": "pictures", "features": "features"},
    "model": PICTURES,
    "diffusion": {"alignment": {}},
    "training": {"total_samples": 64, "global_batch": 8},
    "checkpoint": {"every_samples": 8},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "pictures"}}, r"model.alignment: the alignment loss needs .*; give data.features too"),
        ({"diffusion": {}}, r"give diffusion.alignment too"),
        ({"model": {**PICTURES, "alignment": None}}, r"diffusion.alignment: .* give model.alignment too"),
        ({"mesh": {"sp": 2}}, r"mesh.sp: the alignment loss needs all tokens of a sample on one rank"),
        ({"model": {**PICTURES, "alignment": {"block": 4, "dim": 7}}}, r"alignment.block: 4, but there are only 3"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], message: str) -> None:
    assert TrainRecipe.model_validate(RECIPE).diffusion.alignment == AlignmentLossConfig(weight=0.5)
    with pytest.raises(ValidationError, match=message):
        TrainRecipe.model_validate({**RECIPE, **changes})
