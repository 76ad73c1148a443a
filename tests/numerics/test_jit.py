"""Presets jit-*: outputs and gradients of the authors' JiT, restated in tests/support/jit_reference.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pomscale.config.model import ImageModelConfig
from pomscale.models import DiPoM
from pomscale.plan import num_parameters
from pomscale.pretrained.jit_weights import translate
from support.jit_reference import JitSizes, jit_forward, jit_shapes, jit_weights

every_mixer = pytest.mark.parametrize("mixer", ["attention", "pom"])


def network(sizes: JitSizes, weights: dict[str, Tensor]) -> DiPoM:
    model = DiPoM(sizes.config).to(weights["pos_embed"].dtype)
    model.load_state_dict(translate(weights, sizes.config))
    return model


def batch(sizes: JitSizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(3, 3, sizes.side * sizes.patch, sizes.side * sizes.patch, generator=generator, dtype=dtype)
    return pictures, torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 3, sizes.classes])


@every_mixer
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5)], ids=str)
def test_outputs_and_gradients_are_theirs(mixer: str, start: int, dtype: torch.dtype, tolerance: float) -> None:
    """Our angles are computed in fp32, also for a network in fp64."""
    sizes = JitSizes(mixer, start=start)
    weights = jit_weights(sizes, seed=0, dtype=dtype)
    model = network(sizes, weights)
    leaves = {name: value.requires_grad_() for name, value in weights.items() if name != "pos_embed"}
    pictures, t, classes = batch(sizes, dtype)
    ours, theirs = model(pictures, t, classes), jit_forward(weights, sizes, pictures, 1 - t, classes)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    expected = dict(zip(leaves, torch.autograd.grad(theirs, list(leaves.values()), upstream), strict=True))
    for name, gradient in translate(expected, sizes.config).items():
        found = model.get_parameter(name).grad
        assert found is not None
        assert (found - gradient).norm() <= 10 * tolerance * gradient.norm(), name


@every_mixer
def test_parameters_are_theirs_but_for_the_fixed_positions(mixer: str) -> None:
    sizes = JitSizes(mixer)
    trained = sum(torch.Size(shape).numel() for name, shape in jit_shapes(sizes).items() if name != "pos_embed")
    assert trained == num_parameters(sizes.config)


# Trained parameters of the authors' modules for pictures of 256 pixels and 1000 classes, counted with their code.
_PARAMETERS = {
    "jit-b-16": 131_123_712,
    "jit-b-16-pom": 131_251_344,
    "jit-b-32": 133_190_400,
    "jit-b-32-pom": 133_318_032,
    "jit-l-16": 458_877_664,
    "jit-l-16-pom": 459_317_344,
    "jit-l-32": 461_534_176,
    "jit-l-32-pom": 461_973_856,
    "jit-h-16": 952_514_368,
    "jit-h-16-pom": 953_247_040,
    "jit-h-32": 956_055_616,
    "jit-h-32-pom": 956_788_288,
}


def preset(name: str, side: int) -> ImageModelConfig:
    return ImageModelConfig.model_validate({"preset": name, "latent_shape": (3, side, side), "num_classes": 1000})


@pytest.mark.parametrize("name", _PARAMETERS)
def test_presets_have_the_parameters_of_the_authors_modules(name: str) -> None:
    assert num_parameters(preset(name, 256)) == _PARAMETERS[name]


def test_a_picture_that_the_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="latent_shape: 272x272 is not divisible by patch_size 32"):
        preset("jit-b-32", 272)


def test_another_row_of_the_class_moves_the_tokens_in_context() -> None:
    """Only the tokens in context and c know the class; without them c alone does."""
    sizes = JitSizes("pom")
    weights = jit_weights(sizes, seed=0)
    pictures, t, classes = batch(sizes, torch.float32)
    with_tokens = network(sizes, weights)(pictures, t, classes)
    moved = network(sizes, {**weights, "in_context_posemb": weights["in_context_posemb"] + 1})(pictures, t, classes)
    assert (with_tokens - moved).abs().max() > 1e-3
    config = sizes.config.model_copy(update={"in_context": None})
    assert "in_context.positions" not in dict(DiPoM(config).named_parameters())
