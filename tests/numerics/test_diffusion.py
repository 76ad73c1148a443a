"""Paths, samplers, guidance, loss and draws against closed forms.

Where a test needs a trained network it uses the exact one: for data N(mu, s^2) per channel both E[prediction | x_t]
and the solution of the sampling equation are known.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pomscale.base.keyed_random import Stream
from pomscale.config.names import SamplerName
from pomscale.config.sampling import DEFAULT_SAMPLER
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.diffusion.draws import draw, keyed_normal, sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.guidance import guided
from pomscale.diffusion.objectives import Network, Objective, interpolate, per_sample_loss
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import SAMPLERS
from support.gaussian import MU, SHAPE, S, exact_denoiser, exact_solution, normal, variance
from support.objectives import EPS, EXACT
from support.tiny_pictures import dipom


@pytest.fixture(params=EXACT)
def objective(request: pytest.FixtureRequest) -> Objective:
    return EXACT[request.param]


class Recorded:
    """A network that remembers what it was asked."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((t, condition))
        return self.network(x, t, condition)


# --- paths and objectives --------------------------------------------------------------------------------------------


def test_the_path_leads_from_data_to_noise(objective: Objective) -> None:
    x0, eps = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    ends = interpolate(objective, x0, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends, torch.stack([x0[0], objective.sigma(torch.tensor(1.0)) * eps[1]]))


def test_the_eps_path_is_the_authors_linear_schedule() -> None:
    """x_t = sqrt(1 - t) x0 + sqrt(t) eps."""
    x0, eps = normal(1, *SHAPE), normal(1, *SHAPE, seed=1)
    mixed = interpolate(EPS, x0, eps, torch.tensor([0.36], dtype=torch.float64))
    torch.testing.assert_close(mixed, 0.8 * x0 + 0.6 * eps, rtol=1e-12, atol=1e-12)


def test_a_t_for_every_group_of_frames(objective: Objective) -> None:
    x0, eps = torch.randn(2, 2, 3, 6, 2, 2, dtype=torch.float64).unbind(0)
    t = torch.rand(2, 3, dtype=torch.float64)
    noised = interpolate(objective, x0, eps, t)
    for group in range(3):
        frames = slice(2 * group, 2 * group + 2)
        assert noised[:, :, frames].equal(interpolate(objective, x0[:, :, frames], eps[:, :, frames], t[:, group]))


@pytest.mark.parametrize("t", [torch.tensor([0.01, 0.3, 0.6, 0.99]), torch.tensor(0.4)], ids=["per sample", "scalar"])
def test_decompose_inverts_interpolate(objective: Objective, t: Tensor) -> None:
    x0, eps = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    x = interpolate(objective, x0, eps, t.double())
    found = objective.decompose(x, t.double(), objective.target(x0, eps))
    torch.testing.assert_close(found, (x0, eps), rtol=1e-11, atol=1e-11)


def test_the_target_is_the_slope_of_the_sampling_equation(objective: Objective) -> None:
    """Between fixed x0 and eps, y is a straight line over s, in which eps has weight s; from_ode leads back."""
    x0, eps = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    times = torch.tensor([[0.1, 0.5], [0.7, 0.9]], dtype=torch.float64)
    x, x_next = (interpolate(objective, x0, eps, t) for t in times)
    (y, s), (y_next, s_next) = objective.to_ode(x, times[0]), objective.to_ode(x_next, times[1])
    slope = objective.slope(x, times[0], objective.target(x0, eps))
    torch.testing.assert_close(y_next, y + (s_next - s) * slope, rtol=1e-12, atol=1e-12)
    of_noise, _ = objective.to_ode(interpolate(objective, 0 * x0, eps, times[0]), times[0])
    torch.testing.assert_close(of_noise, s * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(objective.from_ode(y, times[0]), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 50, 333])
def test_the_time_grid_falls_from_noise_to_exactly_zero(objective: Objective, num_steps: int) -> None:
    grid = objective.time_grid(num_steps)
    assert (grid.shape, grid.dtype) == ((num_steps + 1,), torch.float64)
    assert float(grid[0]) == pytest.approx({"flow": 1.0, "eps": 0.999, "x": 1.0}[objective.name], abs=1e-12)
    assert float(grid[-1]) == 0.0
    assert bool((grid.float().diff() < 0).all())


# --- samplers --------------------------------------------------------------------------------------------------------


# Of the midpoint's error the part of second order is 0 for Gaussian data; test_samplers.py has other data.
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("midpoint", 3)])
def test_order_of_convergence(objective: Objective, sampler: SamplerName, order: int) -> None:
    x = normal(4, *SHAPE)
    errors = []
    for num_steps in (200, 400, 800):
        times = objective.time_grid(num_steps)
        found = SAMPLERS[sampler](objective, exact_denoiser(objective), x, times)
        errors.append(float((found - exact_solution(objective, x, times[0])).abs().max()))
    observed = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert observed == pytest.approx([order, order], abs=0.05)


def test_ddim_is_euler_in_exact_arithmetic(objective: Objective) -> None:
    x, times = normal(4, *SHAPE), objective.time_grid(17)
    found = [SAMPLERS[name](objective, exact_denoiser(objective), x, times) for name in ("ddim", "euler")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [("ddim", 7), ("euler", 7), ("heun", 13), ("midpoint", 14), ("dpmpp_2m", 7), ("unipc", 7)],
)
def test_samplers_ask_once_or_twice_per_step_and_never_without_noise(
    objective: Objective, sampler: SamplerName, evaluations: int
) -> None:
    network = Recorded(lambda x, t, condition: exact_denoiser(objective)(x, t))
    denoise = guided(network, torch.zeros(4), torch.zeros(4), 0)
    SAMPLERS[sampler](objective, denoise, normal(4, *SHAPE), objective.time_grid(7))
    assert [tuple(t.shape) for t, _ in network.asked] == [(4,)] * evaluations
    assert min(float(t.min()) for t, _ in network.asked) > 0


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.5, -0.5])
def test_guidance_equals_two_separate_evaluations(weight: float) -> None:
    network = Recorded(dipom(torch.float64))
    x, t = normal(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    condition, null = torch.tensor([0, 4, 2]), torch.full((3,), 5)
    found = guided(network, condition, null, weight)(x, t)
    assert [asked.tolist() for _, asked in network.asked] == [[0, 4, 2, 5, 5, 5]]
    conditional, unconditional = network(x, t, condition), network(x, t, null)
    assert not torch.allclose(conditional, unconditional)
    torch.testing.assert_close(found, conditional + weight * (conditional - unconditional), rtol=1e-10, atol=1e-12)


def test_no_guidance_costs_one_evaluation_of_the_condition_alone() -> None:
    network = Recorded(dipom(torch.float64))
    x, t, condition = normal(2, *SHAPE), torch.full((2,), 0.5), torch.tensor([1, 3])
    found = guided(network, condition, torch.full((2,), 5), 0)(x, t)
    assert [asked.tolist() for _, asked in network.asked] == [[1, 3]]
    assert torch.equal(found, network(x, t, condition))


# --- generate --------------------------------------------------------------------------------------------------------


def pictures(
    objective: Objective, classes: list[int], seeds: list[int], sampler: SamplerName | None, guidance: float
) -> Tensor:
    condition, null = torch.tensor(classes), torch.full((len(classes),), 5)
    noise, of_steps = sampling_noise(seeds, SHAPE, condition), step_noise(seeds, SHAPE, condition)
    options = SamplingOptions(sampler, 6, guidance)
    return generate(objective, dipom(), noise, condition, null, options, step_noise=of_steps)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(objective: Objective, sampler: SamplerName, guidance: float) -> None:
    """To rounding, which is all that a batch may change in a matrix product."""
    together = pictures(objective, [1, 0, 3, 1], [11, 12, 13, 14], sampler, guidance)
    alone = pictures(objective, [3], [13], sampler, guidance)
    reordered = pictures(objective, [1, 1, 0], [14, 11, 12], sampler, guidance)
    torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reordered, together[[3, 0, 1]], rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[3]).abs().max()) > 0.1, "same class, other seed"
    assert together.dtype == torch.float32


def test_the_sampler_follows_the_objective(objective: Objective) -> None:
    default = DEFAULT_SAMPLER[objective.name]
    assert default == {"flow": "euler", "eps": "ddim", "x": "heun"}[objective.name]
    found = {name: pictures(objective, [2], [0], name, 1.0) for name in (None, *SAMPLERS)}
    assert torch.equal(found[None], found[default])
    assert not torch.allclose(found[None], found["midpoint"])


def test_generated_samples_have_the_moments_of_the_data(objective: Objective) -> None:
    def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return exact_denoiser(objective)(x.double(), t.double()).float()

    none = torch.zeros(500)
    noise = sampling_noise(range(500), SHAPE, none)
    found = generate(objective, network, noise, none, none, SamplingOptions(num_steps=100)).double()
    channels = found.transpose(0, 1).flatten(1)  # 8000 numbers per channel
    torch.testing.assert_close(channels.mean(1), MU.flatten(), rtol=0, atol=0.06)
    torch.testing.assert_close(channels.std(1), S.flatten(), rtol=0.04, atol=0)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_each_samples_elements_in_fp32(objective: Objective, dtype: torch.dtype) -> None:
    network = dipom(dtype)
    x0, eps = normal(4, *SHAPE).float(), normal(4, *SHAPE, seed=1).float()
    t, condition = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 5])
    loss = per_sample_loss(objective, network, x0, eps, t, condition)
    prediction = network(interpolate(objective, x0, eps, t), t, condition)
    assert (loss.dtype, prediction.dtype) == (torch.float32, dtype)
    scale = objective.error_scale(t)
    for i, (predicted, target) in enumerate(zip(prediction, objective.target(x0, eps), strict=True)):
        expected = (predicted.double() - target.double()).square().mean() * (1 if scale is None else scale[i] ** 2)
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-6, atol=0)


def test_the_exact_network_reaches_the_least_loss(objective: Objective) -> None:
    """The least loss is the variance of the target given x_t."""
    x0, eps = normal(64, 3, 32, 32), normal(64, 3, 32, 32, seed=1)
    denoise = exact_denoiser(objective)
    t = torch.full((64,), 0.5, dtype=torch.float64)
    loss = per_sample_loss(objective, lambda x, t, _: denoise(x, t), MU + S * x0, eps, t, t)
    alpha, sigma = objective.alpha(t[0]), objective.sigma(t[0])
    weight = {"flow": (alpha + sigma) ** 2, "eps": alpha**2, "x": (sigma / 0.5) ** 2}[objective.name]
    expected = float((weight * S**2 / variance(objective, t[0])).mean())
    assert float(loss.mean()) == pytest.approx(expected, rel=0.02)


# --- draws -----------------------------------------------------------------------------------------------------------


def noising(time: TimeConfig, condition_dropout: float) -> DiffusionConfig:
    return DiffusionConfig(time=time, condition_dropout=condition_dropout)


UNIFORM, LOGIT_NORMAL = TimeConfig(), TimeConfig(distribution="logit_normal", mean=0.3, std=0.8)
MANY = list(range(10_000))


@pytest.mark.parametrize("time", [UNIFORM, LOGIT_NORMAL], ids=["uniform", "logit_normal"])
def test_a_draw_depends_on_its_position_alone(time: TimeConfig) -> None:
    positions = [5, 10**12, 0, 17, 3]
    together = draw(7, positions, SHAPE, noising(time, 0.5))
    for i, position in enumerate(positions):
        alone = draw(7, [position], SHAPE, noising(time, 0.5))
        assert torch.equal(alone.eps[0], together.eps[i])
        assert torch.equal(alone.t[0], together.t[i])
        assert torch.equal(alone.drop_condition[0], together.drop_condition[i])
    assert len({float(eps.sum()) for eps in together.eps}) == len(set(together.t.tolist())) == len(positions)


def test_seeds_and_streams_differ() -> None:
    noise = [keyed_normal(seed, stream, [3], (8,)) for seed in (0, 1) for stream in Stream]
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 2 * len(Stream)


def test_the_keys_mean_the_same_for_ever() -> None:
    """A run resumed by a later version must see the noise it would have seen."""
    noise = keyed_normal(1, Stream.NOISE, [2], (3,))
    expected = torch.tensor([[-0.3608266, -0.2086328, -0.1206944]])
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=0)
    draws = draw(1, [0, 1, 2, 3], (1,), noising(UNIFORM, 0.5))
    torch.testing.assert_close(draws.t, torch.tensor([0.2699071, 0.1520147, 0.5753005, 0.3840339]), rtol=1e-6, atol=0)
    assert draws.drop_condition.tolist() == [False, False, True, True]


def test_no_positions_give_empty_draws_of_the_right_types() -> None:
    draws = draw(0, [], SHAPE, noising(UNIFORM, 0.1))
    assert (draws.eps.shape, draws.t.shape, draws.drop_condition.shape) == ((0, *SHAPE), (0,), (0,))
    assert (draws.eps.dtype, draws.t.dtype, draws.drop_condition.dtype) == (torch.float32, torch.float32, torch.bool)


def test_uniform_time_has_its_moments() -> None:
    t = draw(0, MANY, (1,), noising(UNIFORM, 0)).t
    assert t.dtype == torch.float32
    assert 0 <= float(t.min()) < float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.var()) == pytest.approx(1 / 12, rel=0.03)


def test_logit_normal_time_has_its_moments() -> None:
    logits = draw(0, MANY, (1,), noising(LOGIT_NORMAL, 0)).t.double().logit()
    assert float(logits.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, rel=0.03)
    assert float(((logits - 0.3) ** 3).mean()) == pytest.approx(0, abs=0.05)


def test_noise_is_standard_normal() -> None:
    eps = draw(0, MANY[:2000], SHAPE, noising(UNIFORM, 0)).eps
    assert float(eps.mean()) == pytest.approx(0, abs=0.015)
    assert float(eps.std()) == pytest.approx(1, rel=0.01)
    assert float((eps**4).mean()) == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_conditions_are_dropped_at_the_rate_of_the_recipe(rate: float) -> None:
    dropped = draw(0, MANY, (1,), noising(UNIFORM, rate)).drop_condition
    assert dropped.dtype == torch.bool
    assert float(dropped.double().mean()) == pytest.approx(rate, abs=0.01 if 0 < rate < 1 else 0)


def test_dropping_does_not_choose_times() -> None:
    """It would if both were drawn from one stream: then the dropped would be exactly the small times."""
    draws = draw(0, MANY, (1,), noising(UNIFORM, 0.1))
    assert float(draws.t[draws.drop_condition].mean()) == pytest.approx(0.5, abs=0.03)
