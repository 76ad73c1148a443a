"""Objective x against JiT's own formulas, in their time u = 1 - t; its clamp, noise scale, times and frames given."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.names import SamplerName
from pomscale.config.time_shift import time_shift
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.diffusion.common_loss import COMMON_TIMES, common_loss
from pomscale.diffusion.draws import draw, sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import Network, Objective, XPrediction, build_objective, per_sample_loss
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import SAMPLERS
from pomscale.models import latent_tokens
from support.gaussian import MU, SHAPE, S, exact_denoiser, exact_solution, normal, variance
from support.objectives import EXACT, FLOW
from support.tiny_clips import video_config
from support.tiny_pictures import dipom

CLAMP = 0.05

every_noise_scale = pytest.mark.parametrize("noise_scale", [1.0, 2.0])


# --- training --------------------------------------------------------------------------------------------------------


@every_noise_scale
def test_the_loss_is_that_of_jit(noise_scale: float) -> None:
    """z = u x + (1 - u) e, e = noise_scale eps; the mean of (v - v_pred)^2 with v = (x - z) / max(1 - u, 0.05)."""
    x0, eps = normal(5, 3, 7, 5), normal(5, 3, 7, 5, seed=1)
    t = torch.tensor([0.001, 0.03, 0.05, 0.4, 0.999], dtype=torch.float64)

    def network(z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.sin(3 * z) + t.view(-1, 1, 1, 1)

    u = (1 - t).view(-1, 1, 1, 1)
    z = u * x0 + (1 - u) * noise_scale * eps
    divisor = (1 - u).clamp_min(CLAMP)
    v, v_pred = (x0 - z) / divisor, (network(z, t, t) - z) / divisor
    found = per_sample_loss(XPrediction(CLAMP, noise_scale), network, x0, eps, t, t)
    torch.testing.assert_close(found.double(), (v - v_pred).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_the_loss_of_every_frame_group_has_the_weight_of_its_own_time() -> None:
    """Also where ranks share the tokens of a sample: the sum over their parts is the loss."""
    config = video_config()
    x0, eps = normal(2, 3, 4, 4, 6).float(), normal(2, 3, 4, 4, 6, seed=1).float()
    t, said = torch.tensor([[0.01, 0.6], [0.3, 0.9]]), normal(2, 3, 4, 4, 6, seed=2).float()
    squared = ((said - x0) / t.clamp_min(CLAMP).repeat_interleave(2, dim=1)[:, None, :, None, None]).square()
    objective = XPrediction(CLAMP)
    found = per_sample_loss(objective, lambda x, t, _: said, x0, eps, t, t)
    torch.testing.assert_close(found, squared.mean((1, 2, 3, 4)), rtol=1e-6, atol=0)

    def share(part: slice) -> Tensor:
        def pick(latents: Tensor) -> Tensor:
            return latent_tokens(config, latents)[:, part]

        return per_sample_loss(objective, lambda x, t, _: pick(said), x0, eps, t, t, pick)

    torch.testing.assert_close(share(slice(0, 5)) + share(slice(5, None)), found, rtol=1e-6, atol=0)


def test_the_times_of_jit_have_the_mean_of_the_other_sign() -> None:
    """There logit(u) ~ N(-0.8, 0.8), so most samples are nearer to noise; logit(t) = -logit(u)."""
    config = DiffusionConfig(objective="x", time=TimeConfig(distribution="logit_normal", mean=0.8, std=0.8))
    logits = draw(0, list(range(10_000)), (1,), config).t.double().logit()
    assert float(logits.mean()) == pytest.approx(0.8, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, rel=0.03)


# --- JiT's sampler ---------------------------------------------------------------------------------------------------


def sampled_by_jit(
    network: Network, z: Tensor, labels: Tensor, num_steps: int, scale: float, interval: tuple[float, float]
) -> Tensor:
    """Draw as JiT does, written down from its description: z at u = 0, Heun from u to u, and Euler in the last step.

    The velocity of both halves is guided where interval[0] < u < interval[1]; network(z, t, labels) predicts x.
    """

    def velocity(z: Tensor, u: Tensor) -> Tensor:
        null, t = torch.full_like(labels, 5), (1 - u).expand(len(z))
        v, v_null = ((network(z, t, which) - z) / (1 - u).clamp_min(CLAMP) for which in (labels, null))
        return v_null + (scale if interval[0] < u < interval[1] else 1.0) * (v - v_null)

    for u, u_next in pairwise(torch.linspace(0, 1, num_steps + 1)):
        first = velocity(z, u)
        z_next = z + (u_next - u) * first
        if u_next < 1:
            z_next = z + (u_next - u) * (first + velocity(z_next, u_next)) / 2
        z = z_next
    return z


@every_noise_scale
def test_heun_is_the_sampler_of_jit(noise_scale: float) -> None:
    """50 steps from noise, guidance 2.9 within 0.1 < u < 1, which is 1.9 within 0 < t < 0.9."""
    labels, null = torch.tensor([0, 4, 2]), torch.full((3,), 5)
    config = DiffusionConfig(objective="x", noise_scale=noise_scale)
    noise, weights = sampling_noise([1, 2, 3], SHAPE, labels), dipom()

    def network(z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * weights(z, t, condition)

    options = SamplingOptions(num_steps=50, guidance=1.9, guidance_interval=(0.0, 0.9))
    found = generate(build_objective(config), network, noise, labels, null, options)
    expected = sampled_by_jit(network, noise_scale * noise, labels, 50, 2.9, (0.1, 1.0))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_guidance_on_x_is_guidance_on_v() -> None:
    objective = XPrediction(CLAMP, 2.0)
    z, good, worse = (normal(3, *SHAPE, seed=seed) for seed in range(3))
    for time in (0.01, 0.7):
        t = torch.full((3,), time, dtype=torch.float64)
        v, v_worse = (objective.slope(z, t, prediction) for prediction in (good, worse))
        guided = objective.slope(z, t, good + 1.9 * (good - worse))
        torch.testing.assert_close(guided, v + 1.9 * (v - v_worse), rtol=1e-12, atol=1e-12)


# --- the clamp -------------------------------------------------------------------------------------------------------


def end_of_the_clamped_equation(objective: XPrediction, x: Tensor) -> Tensor:
    """x at t = 0 from x at t = 1 if dx/dt = (x - x0) / max(t, clamp), with the exact x0 of Gaussian data.

    The path's own solution leads to t = clamp; from there on every channel is (x - its mean of x0) / clamp, in float64.
    """
    ends = torch.tensor([1.0, objective.clamp], dtype=torch.float64)
    at_clamp = exact_solution(objective, x, ends[0], ends[1])

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        z, time = torch.from_numpy(flat).view_as(x), torch.tensor(t, dtype=torch.float64)
        return ((z - exact_denoiser(objective)(z, time)) / objective.clamp).flatten().numpy()

    solved = solve_ivp(slope, (objective.clamp, 0), at_clamp.flatten().numpy(), rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1]).view_as(x)


@every_noise_scale
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_samplers_of_the_slope_follow_the_clamped_equation(name: SamplerName, order: int, noise_scale: float) -> None:
    """Grids have a step that ends at the clamp, where the slope has a kink."""
    objective, x, errors = XPrediction(CLAMP, noise_scale), normal(2, *SHAPE), []
    expected = end_of_the_clamped_equation(objective, x)
    for num_steps in (200, 400, 800):
        found = SAMPLERS[name](objective, exact_denoiser(objective), x, objective.time_grid(num_steps))
        errors.append(float((found - expected).abs().max()))
    assert [math.log2(coarse / fine) for coarse, fine in pairwise(errors)] == pytest.approx([order] * 2, abs=0.2)
    data = exact_solution(objective, x, torch.tensor(1.0, dtype=torch.float64))
    assert float((expected - data).abs().max()) > 10 * errors[-1], "the clamp leaves some noise"


@every_noise_scale
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_samplers_of_x0_do_not_depend_on_the_clamp(name: SamplerName, noise_scale: float) -> None:
    x, times = normal(2, *SHAPE), XPrediction().time_grid(40)
    clamped, free = (
        SAMPLERS[name](objective, exact_denoiser(objective), x, times)
        for objective in (XPrediction(0.3, noise_scale), XPrediction(1e-9, noise_scale))
    )
    assert clamped.equal(free)


# --- noise scale and frames given ------------------------------------------------------------------------------------


@every_noise_scale
@pytest.mark.parametrize("name", SAMPLERS)
def test_frames_given_are_on_their_path_below_the_clamp_too(name: SamplerName, noise_scale: float) -> None:
    objective, known = XPrediction(CLAMP, noise_scale), normal(2, 3, 1, 4, 4, seed=7).float()
    none, asked = torch.zeros(2), []

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        asked.append((x, t))
        return 0.2 * x

    noise = sampling_noise([3, 4], (3, 2, 4, 4), none, 2)
    options = SamplingOptions(name, times=(1.0, 0.5, 0.04, 0.02, 0.0))
    of_steps = step_noise([3, 4], (3, 2, 4, 4), none, 2)
    found = generate(objective, network, noise, none, none, options, known=known, step_noise=of_steps)
    assert found[:, :, :1].equal(known)
    assert min(float(t.min()) for _, t in asked) < CLAMP
    for x, t in asked:
        expected = (1 - t[0]) * known + t[0] * noise_scale * noise[:, :, :1]
        torch.testing.assert_close(x[:, :, :1], expected, rtol=1e-6, atol=1e-6)


# --- one loss for all objectives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow_t", [*COMMON_TIMES, 0.5])
def test_the_best_networks_of_all_objectives_have_the_same_loss(flow_t: float) -> None:
    """They see the same data and noise in the same proportion, and say the same x0 of it; the least loss is known."""
    x0, eps = MU + S * normal(32, 3, 32, 32), normal(32, 3, 32, 32, seed=1)
    t = torch.full((32,), flow_t, dtype=torch.float64)

    def best(objective: Objective) -> Tensor:
        denoise = exact_denoiser(objective)
        return common_loss(objective, lambda x, t, _: denoise(x, t), x0, eps, t, t)

    losses = {name: best(objective) for name, objective in EXACT.items()}
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["flow"], rtol=1e-10, atol=0)
    least = float((S**2 / variance(FLOW, t[0])).mean())  # of E[(v - E[v | x_t])^2]; alpha + sigma = 1
    assert float(losses["flow"].mean()) == pytest.approx(least, rel=0.02)


def test_the_common_loss_of_flow_is_its_own() -> None:
    x0, eps, t = normal(3, *SHAPE).float(), normal(3, *SHAPE, seed=1).float(), torch.tensor([0.05, 0.4, 0.95])
    labels = torch.tensor([0, 4, 2])
    own = per_sample_loss(FLOW, dipom(), x0, eps, t, labels)
    torch.testing.assert_close(common_loss(FLOW, dipom(), x0, eps, t, labels), own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", EXACT)
def test_an_error_of_x0_counts_the_same_for_all_objectives(name: str) -> None:
    """A network that is off by d in x0 makes d / t off in v, whatever it predicts."""
    objective, off = EXACT[name], 0.01
    x0, eps = normal(3, *SHAPE), normal(3, *SHAPE, seed=1)
    flow_t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (weight(t).view(-1, 1, 1, 1) for weight in (objective.alpha, objective.sigma))
        wrong = x0 + off
        return objective.target(wrong, (x - alpha * wrong) / sigma)

    found = common_loss(objective, network, x0, eps, flow_t, flow_t)
    torch.testing.assert_close(found, (off / flow_t) ** 2, rtol=1e-9, atol=0)


# --- times shifted by resolution -------------------------------------------------------------------------------------

PICTURES = ImageModelConfig(latent_shape=(3, 8, 8), num_classes=5, dim=16, depth=1, patch_size=2)
CLIPS = VideoModelConfig(kind="video", latent_shape=(4, 8, 6, 8), text_dim=8, dim=16, depth=1, patch_frames=2)


def shifting(base: int | None, **time: Any) -> DiffusionConfig:
    return DiffusionConfig(objective="x", time=TimeConfig(shift_base_tokens=base, **time))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (PICTURES, (3, 8, 8), 1.0),
        (PICTURES, (3, 16, 16), 2.0),
        (CLIPS, (4, 8, 6, 8), math.sqrt(4 * 12 / 16)),
        (CLIPS, (4, 2, 6, 8), math.sqrt(12 / 16)),
        (CLIPS, (4, 6, 8), math.sqrt(12 / 16)),  # a picture among clips
    ],
)
def test_the_shift_grows_with_the_root_of_the_tokens(model: Any, shape: tuple[int, ...], expected: float) -> None:
    assert time_shift(shifting(16), model, shape) == pytest.approx(expected)
    assert time_shift(shifting(None), model, shape) is None


@pytest.mark.parametrize("time", [{}, {"distribution": "logit_normal", "mean": 0.8}, {"per_frame_group": True}])
def test_a_shift_multiplies_noise_over_data_and_draws_nothing_else(time: dict[str, Any]) -> None:
    config, positions = shifting(16, **time), [5, 10**12, 0, 17]
    plain, shifted = (draw(7, positions, SHAPE, config, 3, shift) for shift in (None, 2.5))
    ratios = [t.double() / (1 - t.double()) for t in (plain.t, shifted.t)]
    torch.testing.assert_close(ratios[1], 2.5 * ratios[0], rtol=1e-5, atol=0)
    assert shifted.eps.equal(plain.eps)
    assert shifted.drop_condition.equal(plain.drop_condition)
    assert draw(7, positions[2:], SHAPE, config, 3, 2.5).t.equal(shifted.t[2:]), "it depends on its position alone"
    assert draw(7, positions, SHAPE, config, 3, 1.0).t.equal(plain.t)
