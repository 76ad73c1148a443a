"""What follows the clock in samples: learning rate and EMA; and which parameters AdamW decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pomscale.config.engine import EmaConfig, OptimizerConfig, ScheduleConfig
from pomscale.config.model import ImageModelConfig
from pomscale.engine.averages import ema_weights
from pomscale.engine.optimizers import build_optimizer, learning_rate
from pomscale.models import DiPoM

# --- learning rate ---------------------------------------------------------------------------------------------------

PEAK, TOTAL = 2.0, 1000


def rate(samples: int, **fields: Any) -> float:
    return learning_rate(ScheduleConfig(**fields), PEAK, samples, TOTAL)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (0, 0),
        (50, PEAK / 2),
        (100, PEAK),
        (600, PEAK),
        (700, PEAK / 2),  # a quarter of the cooldown: 1 - sqrt(1/4)
        (856, PEAK * 0.2),  # 1 - sqrt(0.64)
        (1000, 0),
    ],
)
def test_warm_up_constant_and_square_root_cooldown(samples: int, expected: float) -> None:
    assert rate(samples, warmup_samples=100, cooldown_samples=400) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("samples", [0, 1, 500, 1000])
def test_without_warm_up_and_cooldown_it_is_the_peak(samples: int) -> None:
    assert rate(samples) == PEAK


def test_warm_up_may_meet_cooldown() -> None:
    rates = [rate(samples, warmup_samples=300, cooldown_samples=700) for samples in range(TOTAL + 1)]
    assert rates[300] == PEAK == max(rates)
    assert rates[:301] == sorted(rates[:301])
    assert rates[300:] == sorted(rates[300:], reverse=True)
    assert rates[-1] == 0


# --- EMA -------------------------------------------------------------------------------------------------------------


def weight(config: EmaConfig, samples: int, batch: int) -> float:
    return ema_weights(config, samples, batch)[config.main]


def kept(config: EmaConfig, first: int, last: int, batch: int) -> float:
    """The share of the average at `first` that is left in the average at `last`."""
    return math.prod(1 - weight(config, samples, batch) for samples in range(first + batch, last + 1, batch))


@pytest.mark.parametrize("batch", [1, 8, 64, 640])
@pytest.mark.parametrize("first", [0, 128_000])
def test_after_a_half_life_half_of_the_old_average_is_left_at_any_batch_size(first: int, batch: int) -> None:
    config = EmaConfig(halflives_samples=[6400], rampup_ratio=None)
    assert kept(config, first, first + 6400, batch) == pytest.approx(0.5, rel=1e-9)


def test_ramp_up_shortens_the_half_life_to_its_share_of_the_samples_seen() -> None:
    config = EmaConfig(halflives_samples=[1000], rampup_ratio=0.1)
    assert weight(config, 2000, 8) == pytest.approx(1 - 0.5 ** (8 / 200))
    steady = weight(EmaConfig(halflives_samples=[1000], rampup_ratio=None), 2000, 8)
    assert weight(config, 10_000, 8) == weight(config, 50_000, 8) == pytest.approx(steady)


def test_ramp_up_forgets_the_initial_weights() -> None:
    """Even when the run is much shorter than the half-life."""
    assert kept(EmaConfig(halflives_samples=[10**9]), 0, 6400, 64) < 1e-9
    assert kept(EmaConfig(halflives_samples=[10**9], rampup_ratio=None), 0, 6400, 64) > 0.99


# --- weight decay ----------------------------------------------------------------------------------------------------


def test_all_is_decayed_but_biases_the_class_embedding_and_coefficients() -> None:
    """Without gradients AdamW does nothing but decay."""
    fields: dict[str, Any] = {"latent_shape": (2, 4, 4), "num_classes": 3, "dim": 8, "depth": 2, "num_heads": 2}
    v2 = {"kind": "pom", "form": "coefficients"}
    model = DiPoM(ImageModelConfig.model_validate({**fields, "depth": 3, "mixer": ["pom", "attention", v2]}))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name in ("class_embedding.weight", "trunk.2.mixer.coefficients")
        expected = torch.full_like(parameter, 1.0 if spared else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    assert [name for name, parameter in model.named_parameters() if parameter.ndim == 1 and "bias" not in name] == []
