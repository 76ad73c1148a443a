"""Guidance: its cost, its interval and schedule over time, its scaling by resolution, and guides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pomscale.diffusion.draws import sampling_noise, step_noise
from pomscale.diffusion.generate import generate
from pomscale.diffusion.guidance import Autoguided, guidance_weight, guided
from pomscale.diffusion.objectives import OBJECTIVES, Network
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.samplers import SAMPLERS
from support.gaussian import SHAPE, normal
from support.tiny_pictures import dipom

CONDITION, NULL = torch.tensor([0, 4, 2]), torch.full((3,), 5)


class Counted:
    """A network that keeps the batch and the time of each evaluation."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.asked: list[tuple[int, float]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.asked.append((len(x), float(t[0])))
        return self.network(x, t, condition)


def weight(options: SamplingOptions, t: float, size: tuple[int, int] = (4, 4)) -> float:
    found = guidance_weight(options, size)
    return found(t) if callable(found) else found


def draw(network: Any, options: SamplingOptions, objective: str = "flow") -> Tensor:
    seeds = [1, 2, 3]
    noise, of_steps = sampling_noise(seeds, SHAPE, CONDITION), step_noise(seeds, SHAPE, CONDITION)
    return generate(OBJECTIVES[objective](), network, noise, CONDITION, NULL, options, step_noise=of_steps)


# --- interval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outside_of_the_interval_only_the_conditional_half_is_evaluated(objective: str, sampler: Any) -> None:
    network = Counted(dipom())
    draw(network, SamplingOptions(sampler, 10, 1.5, (0.25, 0.75)), objective)
    times = [t for _, t in network.asked]
    assert {0.25 < t < 0.75 for t in times} == {True, False}
    assert [batch for batch, _ in network.asked] == [6 if 0.25 < t < 0.75 else 3 for t in times]


def test_the_interval_of_jit_is_0_to_09() -> None:
    """JiT, in its own time u = 1 - t with 50 steps: guided where (u < 1) and (u > 0.1 or the lower end is 0)."""
    times = OBJECTIVES["flow"]().time_grid(50).float()[:-1]
    theirs = [u < 1 and u > torch.tensor(0.1) for u in torch.linspace(0, 1, 51)[:-1]]
    ours = [weight(SamplingOptions(guidance=1.9, guidance_interval=(0, 0.9)), float(t)) for t in times]
    assert ours == [1.9 if inside else 0 for inside in theirs]
    assert sum(w > 0 for w in ours) == 44


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ((0.0, 1.0), [0.0, 0.5, 1.0], []),
        ((0.0, 0.3), [0.0, 0.2], [0.3, 1.0]),
        ((0.3, 1.0), [0.4, 1.0], [0.0, 0.3]),
        ((0.3, 0.7), [0.31, 0.69], [0.3, 0.7]),
    ],
)
def test_ends_belong_to_an_interval_only_if_they_are_those_of_time(
    interval: tuple[float, float], inside: list[float], outside: list[float]
) -> None:
    options = SamplingOptions(guidance=2.0, guidance_interval=interval)
    in_fp32 = [[float(torch.tensor(t)) for t in times] for times in (inside, outside)]
    assert [weight(options, t) for t in in_fp32[0]] == [2.0] * len(inside)
    assert [weight(options, t) for t in in_fp32[1]] == [0.0] * len(outside)


def test_an_interval_without_a_step_is_no_guidance() -> None:
    found = draw(dipom(), SamplingOptions(num_steps=4, guidance=3.0, guidance_interval=(0.8, 0.9)))
    assert found.equal(draw(dipom(), SamplingOptions(num_steps=4)))


# --- schedule and resolution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "at_half"), [("linear", 1.0), ("cosine", 1.0), ("constant", 1.0)])
def test_schedules_have_the_mean_of_a_constant_weight(schedule: Any, at_half: float) -> None:
    options = SamplingOptions(guidance=3.0, guidance_schedule=schedule)
    mean = sum(weight(options, (i + 0.5) / 1000) for i in range(1000)) / 1000
    assert mean == pytest.approx(3.0, rel=1e-5)
    assert weight(options, 0.5) == pytest.approx(3 * at_half)
    ends = [weight(options, 0.0), weight(options, 1.0)]
    assert ends == pytest.approx([3, 3] if schedule == "constant" else [6, 0])


def test_a_weight_that_depends_on_time_is_applied_at_each_time() -> None:
    network, x = dipom(torch.float64), normal(3, *SHAPE)
    found = guidance_weight(SamplingOptions(guidance=1.5, guidance_schedule="cosine"), (4, 4))
    denoise = guided(network, CONDITION, NULL, found)
    for time in (0.1, 0.8):
        t = torch.full((3,), time, dtype=torch.float64)
        conditional, unconditional = network(x, t, CONDITION), network(x, t, NULL)
        expected = conditional + 1.5 * (1 + math.cos(math.pi * time)) * (conditional - unconditional)
        torch.testing.assert_close(denoise(x, t), expected, rtol=1e-9, atol=1e-10)


def test_the_weight_grows_with_the_side_of_the_latents() -> None:
    """w = w0 s / s0, and not w + 1, which is the scale of diffusers."""
    options = SamplingOptions(guidance=1.5, guidance_base_size=32)
    assert [weight(options, 0.5, size) for size in ((32, 32), (64, 64), (16, 64), (96, 24))] == pytest.approx(
        [1.5, 3.0, 1.5, 2.25]
    )
    assert draw(dipom(), SamplingOptions(num_steps=4, guidance=1.5, guidance_base_size=2)).equal(
        draw(dipom(), SamplingOptions(num_steps=4, guidance=3.0))
    )


# --- guides ----------------------------------------------------------------------------------------------------------


def test_autoguidance_leads_away_from_the_guide() -> None:
    network, guide = dipom(torch.float64), dipom(torch.float64, seed=1)
    x, t = normal(3, *SHAPE), torch.full((3,), 0.4, dtype=torch.float64)
    found = guided(Autoguided[Network](network, guide), CONDITION, NULL, 0.7)(x, t)
    good, worse = network(x, t, CONDITION), guide(x, t, CONDITION)
    assert not torch.allclose(good, worse)
    assert found.equal(good + 0.7 * (good - worse))


def test_a_guide_is_asked_inside_of_the_interval_alone_and_never_without_a_condition() -> None:
    network, guide = Counted(dipom()), Counted(dipom(seed=1))
    draw(Autoguided[Network](network, guide), SamplingOptions("heun", 8, 1.0, (0.0, 0.5)))
    assert [batch for batch, _ in network.asked] == [3] * 15
    assert guide.asked == [(3, t) for _, t in network.asked if t < 0.5]
    assert 0 < len(guide.asked) < 15


def test_a_guide_that_is_the_network_itself_changes_nothing() -> None:
    options = SamplingOptions("dpmpp_2m", 5, 2.0)
    assert draw(Autoguided[Network](dipom(), dipom()), options).equal(draw(dipom(), SamplingOptions("dpmpp_2m", 5)))
