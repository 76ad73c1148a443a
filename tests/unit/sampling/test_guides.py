"""A second model as the guide of pictures: the same data, or one clear error; and `sample` with every option."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.diffusion.samplers import SAMPLERS
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import PretrainedDiPoM
from pomscale.sampling.api import sample

COMMON: dict[str, Any] = {"num_steps": 4, "guidance": 1.5}


def pretrained(
    seed: int = 0,
    *,
    objective: Literal["flow", "eps", "x"] = "flow",
    noise_scale: float | None = None,
    shift_base_tokens: int | None = None,
    mean: tuple[float, ...] = (0.0,) * 3,
    names: tuple[str, ...] = (),
    **fields: Any,
) -> PretrainedDiPoM:
    config = ImageModelConfig(**{"latent_shape": (3, 4, 4), "num_classes": 5, "dim": 16, "depth": 1, **fields})
    model = PretrainedDiPoM(
        ModelCard(
            model=config,
            diffusion=DiffusionConfig(
                objective=objective, noise_scale=noise_scale, time=TimeConfig(shift_base_tokens=shift_base_tokens)
            ),
            sampling=SamplingConfig(),
            codec=PixelCodecConfig(name="pixel"),
            codec_identity=None,
            class_names=names,
            latent_mean=mean,
            latent_std=(1.0,) * 3,
            averages=(),
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2, generator=generator)
    return model.requires_grad_(False)


def test_a_guide_may_be_of_another_size() -> None:
    model, guide = pretrained(), pretrained(1, dim=8, depth=2)
    guided = sample(model, [0, 1], seeds=[3, 4], guide=guide, **COMMON)
    assert not torch.allclose(guided, sample(model, [0, 1], seeds=[3, 4], **COMMON))
    assert torch.equal(
        sample(model, [0, 1], seeds=[3, 4], guide=model, **COMMON), sample(model, [0, 1], seeds=[3, 4], num_steps=4)
    )


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"latent_shape": (3, 8, 8)}, r"its latent shape is \(3, 8, 8\), and the model's is \(3, 4, 4\)"),
        ({"objective": "eps"}, "its objective is eps, and the model's is flow"),
        ({"num_classes": 7}, "its number of classes is 7, and the model's is 5"),
        ({"mean": (0.1, 0.0, 0.0)}, r"its mean of the latents is \(0.1"),
        ({"names": ("a", "b")}, r"its class names is \('a', 'b'\)"),
    ],
)
def test_a_guide_of_other_data_is_refused(guide: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"guide: {message}"):
        sample(pretrained(names=("a", "c")), [0], seeds=[0], guide=pretrained(**guide), **COMMON)


def test_a_guide_of_another_noise_scale_is_refused_and_one_of_the_same_is_not() -> None:
    model, guide = (pretrained(seed, objective="x", noise_scale=2.0) for seed in range(2))
    assert not sample(model, [0], seeds=[0], guide=guide, **COMMON).equal(sample(model, [0], seeds=[0], num_steps=4))
    with pytest.raises(InputError, match=r"guide: its noise scale is 1\.0, and the model's is 2\.0"):
        sample(model, [0], seeds=[0], guide=pretrained(objective="x"), **COMMON)


@pytest.mark.parametrize("objective", ["flow", "x"])
def test_pictures_are_drawn_on_the_shifted_grid_of_training(objective: Any) -> None:
    """4 tokens where the times of 1 stay as they are: the shift is 2."""
    model, plain = pretrained(objective=objective, shift_base_tokens=1), pretrained(objective=objective)
    draw: dict[str, Any] = {"seeds": [0], "num_steps": 4}
    assert sample(model, [0], **draw).equal(sample(plain, [0], **draw, shift=2.0))
    assert sample(model, [0], **draw, grid="uniform").equal(sample(plain, [0], **draw))
    assert not sample(model, [0], **draw).equal(sample(plain, [0], **draw))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", ["flow", "eps", "x"])
def test_pictures_of_every_sampler_are_finite_and_of_their_seed(sampler: Any, objective: Any) -> None:
    model = pretrained(objective=objective)
    options: dict[str, Any] = {"sampler": sampler, "guidance_interval": (0.1, 0.9), "grid": "rho", **COMMON}
    together = sample(model, [0, 1, 2], seeds=[3, 4, 5], **options)
    assert bool(together.isfinite().all())
    for batch in (1, 2):
        found = sample(model, [0, 1, 2], seeds=[3, 4, 5], batch=batch, **options)
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="guidence"):
        sample(pretrained(), [0], seeds=[0], guidence=1.0)  # type: ignore[call-arg]
