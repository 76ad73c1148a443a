"""Samplers, time grids and added noise: against diffusers' schedulers, closed forms and convergence orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.config.names import SamplerName
from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.objectives import Objective, interpolate
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import SAMPLERS, build_sampler
from pomscale.diffusion.samplers.types import Denoiser
from pomscale.diffusion.time_grids import sampling_times, start_of
from support.gaussian import MU, SHAPE, S, exact_denoiser, exact_solution, normal, variance
from support.objectives import EPS, EXACT, FLOW
from support.pairs import every_pair
from support.tiny_pictures import dipom

STEPS = 11
EXPLICIT = (0.999, *(i / 300 for i in range(299, -1, -1)))
STOCHASTIC = [("ddpm", None), ("ddim", 1.0), ("ddim", 0.4), ("sde", 1.0), ("sde", 0.3)]

every_objective = pytest.mark.parametrize("objective", EXACT.values(), ids=EXACT)
flow_and_eps = pytest.mark.parametrize("objective", [FLOW, EPS], ids=["flow", "eps"])


# --- beside diffusers ------------------------------------------------------------------------------------------------


def model(x: Tensor, t: Tensor) -> Tensor:
    """A network of fp32 that knows noise when it sees it, as trained ones do: else eps would be divided by 0.03."""
    return x + 0.3 * dipom()(x, t, torch.arange(len(x)) % 5)


def in_diffusers(scheduler: Any, timesteps: Tensor, times: Tensor, x: Tensor, scale: Callable[[int], float]) -> Tensor:
    """The scheduler's result: `timesteps` are its own names of the evaluations at `times`."""
    for index, (timestep, t) in enumerate(zip(timesteps, times, strict=True)):
        prediction = model(x * scale(index), t.expand(len(x)))
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x


def unscaled(_: int) -> float:
    return 1.0


def ours(name: SamplerName, objective: Objective, times: Tensor, x: Tensor, **options: Any) -> Tensor:
    return SAMPLERS[name](objective, model, x, times, **options)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_euler_and_heun_of_flow_equal_diffusers() -> None:
    x, times = normal(4, *SHAPE).float(), FLOW.time_grid(STEPS).float()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    assert_equal(ours("euler", FLOW, times, x), in_diffusers(scheduler, scheduler.timesteps, times[:-1], x, unscaled))

    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    inner = times[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([times[:1], inner, times[-1:]])
    evaluated = torch.cat([times[:1], inner])
    scheduler.timesteps = 1000 * evaluated
    assert_equal(ours("heun", FLOW, times, x), in_diffusers(scheduler, scheduler.timesteps, evaluated, x, unscaled))


def test_heun_of_eps_equals_the_heun_of_edm_in_diffusers() -> None:
    """In the coordinates x / alpha, whose sigma is ours over alpha."""
    x, times = normal(4, *SHAPE).float(), EPS.time_grid(STEPS).float()
    sigma = (EPS.sigma(times.double()) / EPS.alpha(times.double())).float()
    scheduler: Any = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    inner = torch.arange(1, STEPS).repeat_interleave(2)
    scheduler.sigmas = torch.cat([sigma[:1], sigma[inner], sigma[-1:]])
    evaluated = torch.cat([torch.zeros(1, dtype=torch.int64), inner])
    scheduler.timesteps = 1000 * times[evaluated]
    alpha = EPS.alpha(times[evaluated].double()).tolist()
    found = in_diffusers(scheduler, scheduler.timesteps, times[evaluated], x / alpha[0], lambda index: alpha[index])
    assert_equal(ours("heun", EPS, times, x), found)


def on_our_path(scheduler: Any, times: Tensor) -> Any:
    """The scheduler of discrete timesteps N - 1 to 0, with the cumulative products of our times."""
    scheduler.alphas_cumprod = (1 - times[:-1].double()).flip(0).float()
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == list(range(STEPS - 1, -1, -1))
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_equals_diffusers(eta: float) -> None:
    x, times = normal(4, *SHAPE).float(), EPS.time_grid(STEPS).float()
    added = [normal(4, *SHAPE, seed=7 + step).float() for step in range(STEPS)]
    scheduler = on_our_path(diffusers.DDIMScheduler(STEPS, clip_sample=False), times)
    expected = x
    for step, t in enumerate(times[:-1]):
        prediction = model(expected, t.expand(len(x)))
        noise = added[step] if eta else None
        expected = scheduler.step(
            prediction, scheduler.timesteps[step], expected, eta=eta, variance_noise=noise
        ).prev_sample
    assert_equal(ours("ddim", EPS, times, x, eta=eta, step_noise=added.__getitem__), expected)


def test_ddpm_equals_diffusers() -> None:
    x, times = normal(4, *SHAPE).float(), EPS.time_grid(STEPS).float()
    scheduler = on_our_path(diffusers.DDPMScheduler(STEPS, variance_type="fixed_small", clip_sample=False), times)
    theirs, mine = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = x
    for timestep, t in zip(scheduler.timesteps, times[:-1], strict=True):
        prediction = model(expected, t.expand(len(x)))
        expected = scheduler.step(prediction, timestep, expected, generator=theirs).prev_sample
    found = ours("ddpm", EPS, times, x, step_noise=lambda _: torch.randn(x.shape, generator=mine))
    assert_equal(found, expected)


@pytest.mark.parametrize("steps", [5, 11, 20])
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [("dpmpp_2m", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)],
)
@flow_and_eps
def test_multistep_samplers_equal_diffusers(
    objective: Objective, name: SamplerName, scheduler_class: Any, steps: int
) -> None:
    """Also from t = 1, where log(alpha / sigma) is infinite; diffusers' UniPC cannot begin there."""
    times = objective.time_grid(steps)
    if objective is FLOW and name == "unipc":
        times = 0.9999 * times
    times, x = times.float(), normal(4, *SHAPE).float()
    is_flow = objective is FLOW
    scheduler = scheduler_class(
        solver_order=2,
        prediction_type="flow_prediction" if is_flow else "epsilon",
        use_flow_sigmas=is_flow,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    sigmas = times.double() if is_flow else objective.sigma(times.double()) / objective.alpha(times.double())
    scheduler.sigmas = sigmas.float()
    scheduler.timesteps = torch.arange(steps, 0, -1)
    expected = in_diffusers(scheduler, scheduler.timesteps, times[:-1], x, unscaled)
    assert_equal(ours(name, objective, times, x), expected)


# --- orders of convergence -------------------------------------------------------------------------------------------


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


class TwoBumps:
    """Data 1/2 N(1, 0.3^2) + 1/2 N(-1, 0.3^2), in one dimension: the flow is not linear, and still known.

    A solution of the sampling equation keeps its quantile.
    """

    std = 0.3

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def cdf(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.objective.alpha(t)
        std = ((alpha * self.std) ** 2 + self.objective.sigma(t) ** 2).sqrt()
        return (torch.special.ndtr((x - alpha) / std) + torch.special.ndtr((x + alpha) / std)) / 2

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        alpha, sigma = self.objective.alpha(t), self.objective.sigma(t)
        var = (alpha * self.std) ** 2 + sigma**2
        mean = torch.tanh(alpha * x / var)  # of the bump, given x
        x0 = mean + alpha * self.std**2 / var * (x - alpha * mean)
        return self.objective.target(x0, (x - alpha * x0) / sigma)

    def solution(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        quantile = self.cdf(x, t)
        low, high = torch.full_like(x, -9), torch.full_like(x, 9)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, t_end) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("midpoint", 2), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)]
)
@every_objective
def test_order_of_convergence_where_the_flow_is_not_linear(objective: Objective, name: SamplerName, order: int) -> None:
    """Between two times at which both data and noise have weight, so that all steps are of the sampler's own order."""
    data, errors = TwoBumps(objective), []
    x = torch.tensor([[-1.3], [-0.4], [0.1], [0.8]], dtype=torch.float64)
    for num_steps in (200, 400, 800):
        times = torch.linspace(0.9, 0.2, num_steps + 1, dtype=torch.float64)
        found = SAMPLERS[name](objective, data.denoise, x, times)
        errors.append(float((found - data.solution(x, times[0], times[-1])).abs().max()))
    assert orders(errors) == pytest.approx([order, order], abs=0.1)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
@every_objective
def test_multistep_samplers_reach_the_data_faster_than_euler(objective: Objective, name: SamplerName) -> None:
    """On the grids of sampling, whose first and last steps are infinite in log(alpha / sigma)."""
    x, errors = normal(4, *SHAPE), []
    for num_steps in (100, 200, 400):
        times = objective.time_grid(num_steps)
        exact = exact_solution(objective, x, times[0])
        found, euler = (SAMPLERS[n](objective, exact_denoiser(objective), x, times) for n in (name, "euler"))
        errors.append(float((found - exact).abs().max()))
        assert errors[-1] < 0.1 * float((euler - exact).abs().max())
    assert all(1.3 < order < 2.3 for order in orders(errors))  # 2, but for a logarithm


def moments_of_a_sampler(
    objective: Objective, options: SamplingOptions, *, exact_start: bool = True
) -> tuple[Tensor, Tensor]:
    """Exact mean and variance (1 c 1 1) of what a sampler makes of Gaussian data.

    With the exact denoiser its result is affine in the first noise and in that of each step: a row of the batch for
    each coefficient, and a last one without any noise.
    """
    options = options.resolved(objective.name)
    times = sampling_times(objective, options).double()
    num_rows = len(times) + 1
    impulses = torch.eye(num_rows, dtype=torch.float64)[:, :, None, None, None].expand(-1, -1, *SHAPE[:1], 1, 1)
    x, t = impulses[:, 0], times[0]
    x = objective.alpha(t) * MU + variance(objective, t).sqrt() * x if exact_start else start_of(objective, x, times)
    sampler = build_sampler(options, lambda step: impulses[:, step + 1])
    made = sampler(objective, exact_denoiser(objective), x, times)
    return made[-1:], (made[:-1] - made[-1:]).square().sum(0, keepdim=True)


@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
@every_objective
def test_stochastic_samplers_have_the_right_distribution_to_first_order(
    objective: Objective, name: SamplerName, eta: float | None
) -> None:
    errors = []
    for num_steps in (200, 400, 800):
        mean, var = moments_of_a_sampler(objective, SamplingOptions(name, num_steps, eta=eta))
        torch.testing.assert_close(mean, MU, rtol=0, atol=1e-6)  # times are fp32
        errors.append(float((var - S**2).abs().max()))
    assert errors[-1] < 0.02
    assert orders(errors) == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
@every_objective
def test_generated_samples_have_the_moments_that_their_sampler_leads_to(
    objective: Objective, name: SamplerName, eta: float | None
) -> None:
    """With the noise that is keyed by seed and step: each of it is a standard normal, independent of all other."""

    def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return exact_denoiser(objective)(x.double(), t.double()).float()

    none, seeds, options = torch.zeros(300), range(300), SamplingOptions(name, 15, eta=eta)
    noise, of_steps = sampling_noise(seeds, SHAPE, none), step_noise(seeds, SHAPE, none)
    found = generate(objective, network, noise, none, none, options, step_noise=of_steps).double()
    channels = found.transpose(0, 1).flatten(1)  # 4800 numbers per channel
    mean, var = moments_of_a_sampler(objective, options, exact_start=False)
    torch.testing.assert_close(channels.mean(1), mean.flatten(), rtol=0, atol=0.08)
    torch.testing.assert_close(channels.std(1), var.sqrt().flatten(), rtol=0.04, atol=0)


@every_objective
def test_without_noise_ddim_and_sde_are_deterministic(objective: Objective) -> None:
    x, times = normal(4, *SHAPE), objective.time_grid(9)
    found = [SAMPLERS[name](objective, exact_denoiser(objective), x, times, eta=0) for name in ("ddim", "sde")]
    assert found[0].equal(SAMPLERS["ddim"](objective, exact_denoiser(objective), x, times))
    assert found[1].equal(SAMPLERS["euler"](objective, exact_denoiser(objective), x, times))


# --- unchanged -------------------------------------------------------------------------------------------------------


def plain(name: SamplerName, objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """The three first samplers as they were first written, operation by operation."""
    for t, t_next in pairwise(times):
        prediction = denoise(x, t.expand(len(x)))
        if name == "ddim":
            x = interpolate(objective, *objective.decompose(x, t, prediction), t_next)
            continue
        (y, s), (_, s_next) = objective.to_ode(x, t), objective.to_ode(x, t_next)
        x = objective.from_ode(y + (s_next - s) * prediction, t_next)
        if name == "heun" and t_next > 0:
            second = denoise(x, t_next.expand(len(x)))
            x = objective.from_ode(y + (s_next - s) * (prediction + second) / 2, t_next)
    return x


@pytest.mark.parametrize("name", ["ddim", "euler", "heun"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@flow_and_eps
def test_default_options_give_the_same_bits_as_ever(objective: Objective, guidance: float, name: SamplerName) -> None:
    network, condition, null = dipom(), torch.tensor([0, 4, 2]), torch.full((3,), 5)
    noise = sampling_noise([1, 2, 3], SHAPE, condition)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if not guidance:
            return network(x, t, condition)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        conditional, unconditional = both.chunk(2)
        return conditional + guidance * (conditional - unconditional)

    found = generate(objective, network, noise, condition, null, SamplingOptions(name, 7, guidance))
    assert found.equal(plain(name, objective, denoise, noise, objective.time_grid(7).float()))


# --- grids -----------------------------------------------------------------------------------------------------------


def grid(objective: Objective, **options: Any) -> Tensor:
    return sampling_times(objective, SamplingOptions(**options).resolved(objective.name))


@every_objective
def test_the_uniform_grid_is_the_objectives_own(objective: Objective) -> None:
    assert grid(objective, num_steps=7).equal(objective.time_grid(7).float())


def test_the_shift_of_flow_is_that_of_stable_diffusion_3() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = FLOW.time_grid(9)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    torch.testing.assert_close(grid(FLOW, num_steps=9, shift=3.0), scheduler.sigmas, rtol=1e-6, atol=0)


@every_objective
def test_a_shift_multiplies_noise_over_data(objective: Objective) -> None:
    uniform, shifted = (grid(objective, num_steps=9, shift=shift).double()[1:-1] for shift in (1.0, 2.5))
    torch.testing.assert_close(uniform, objective.time_grid(9)[1:-1], rtol=1e-6, atol=0)
    ratios = [objective.sigma(t) / objective.alpha(t) for t in (uniform, shifted)]
    torch.testing.assert_close(ratios[1], 2.5 * ratios[0], rtol=1e-5, atol=0)


@every_objective
def test_the_grid_of_edm(objective: Objective) -> None:
    times = grid(objective, num_steps=18, grid="rho").double()
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    found = objective.sigma(times[:-1]) / objective.alpha(times[:-1])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)
    assert times[-1] == 0
    assert grid(objective, num_steps=18, rho=7.0).double().equal(times)
    assert not grid(objective, num_steps=18, rho=3.0).double().equal(times)


def test_explicit_times_are_taken_as_they_are() -> None:
    assert grid(FLOW, times=(1.0, 0.5, 0.2, 0.0)).equal(torch.tensor([1, 0.5, 0.2, 0]))


def test_times_that_are_one_number_in_fp32_are_refused() -> None:
    with pytest.raises(InputError, match=r"two of 2 steps on the grid times begin at the same time in fp32"):
        grid(FLOW, times=(1.0, 1.0 - 1e-12, 0.0))


LATER_GRIDS: dict[str, dict[str, Any]] = {
    "rho": {"grid": "rho", "num_steps": 300},
    "shift": {"shift": 3.0, "num_steps": 300},
    "times": {"times": EXPLICIT},
}


@pytest.mark.parametrize(
    ("objective", "name", "options"), every_pair({"flow": FLOW, "eps": EPS}, list(SAMPLERS), LATER_GRIDS)
)
def test_every_sampler_makes_the_data_on_every_grid(
    objective: Objective, name: SamplerName, options: dict[str, Any]
) -> None:
    mean, var = moments_of_a_sampler(objective, SamplingOptions(name, **options))
    torch.testing.assert_close(mean, MU, rtol=0, atol=1e-3)
    torch.testing.assert_close(var, S**2, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("objective", "options", "scale"),
    [
        (FLOW, {}, 1.0),
        (EPS, {}, 1.0),  # sigma(0.999) would be 0.9995; all results were made with 1
        (FLOW, {"shift": 2.0}, 1.0),
        (EPS, {"shift": 2.0}, 1.0),
        (FLOW, {"grid": "rho"}, 80 / 81),
        (FLOW, {"times": (0.95, 0.0)}, 0.95),
        (EPS, {"times": (0.95, 0.0)}, math.sqrt(0.95)),
    ],
)
def test_a_grid_that_begins_later_starts_with_less_noise(
    objective: Objective, options: dict[str, Any], scale: float
) -> None:
    noise = normal(2, *SHAPE).float()
    torch.testing.assert_close(start_of(objective, noise, grid(objective, **options)), scale * noise)


# --- noise of the steps ----------------------------------------------------------------------------------------------


def test_noise_is_keyed_by_seed_frame_group_and_step() -> None:
    none = torch.zeros(2)
    first = step_noise([5, 6], SHAPE, none)
    assert first(3).equal(step_noise([5, 6], SHAPE, none)(3))
    assert first(3)[1:].equal(step_noise([6], SHAPE, none)(3))
    different = [first(0)[0], first(0)[1], first(1)[0], sampling_noise([5], SHAPE, none)[0]]
    assert len({float(noise.sum()) for noise in different}) == 4
    clip = (3, 4, 2, 2)  # two frame groups of two frames
    whole = step_noise([5, 6], clip, none, 2)(3)
    for group in range(2):
        part = step_noise([5, 6], (3, 2, 2, 2), none, 2, group)(3)
        assert whole[:, :, 2 * group : 2 * group + 2].equal(part)
    assert not whole[:, :, :2].equal(whole[:, :, 2:])


def test_a_stochastic_sampler_needs_noise() -> None:
    with pytest.raises(ValueError, match="sampler sde adds noise in its steps: give step_noise"):
        build_sampler(SamplingOptions("sde").resolved("flow"), None)
