"""Options of sampling: the recipe's, unless something else is asked for; contradictions are one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from pomscale.base.errors import InputError
from pomscale.config.sampling import SamplingConfig
from pomscale.diffusion.options import SamplingChanges, SamplingOptions

RECIPE = SamplingConfig(sampler="heun", num_steps=7, guidance=1.5)
NOISY = SamplingConfig(sampler="ddim", eta=0.5, shift=3.0, guidance_interval=(0.0, 0.9))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, SamplingOptions("heun", 7, 1.5)),
        ({"sampler": None, "num_steps": None, "guidance": None}, SamplingOptions("heun", 7, 1.5)),
        ({"sampler": "ddim", "num_steps": 3}, SamplingOptions("ddim", 3, 1.5)),
        ({"guidance": 0.0}, SamplingOptions("heun", 7, 0.0)),
        ({"times": (1.0, 0.4, 0.0)}, SamplingOptions("heun", 2, 1.5, times=(1.0, 0.4, 0.0))),
        ({"guidance_interval": (0.1, 0.8)}, SamplingOptions("heun", 7, 1.5, (0.1, 0.8))),
    ],
)
def test_what_is_not_asked_for_is_as_in_the_recipe(changes: SamplingChanges, expected: SamplingOptions) -> None:
    assert SamplingOptions.from_recipe(RECIPE, **changes) == expected


def test_the_defaults_are_those_of_a_recipe_that_says_nothing() -> None:
    assert SamplingOptions.from_recipe(SamplingConfig()) == SamplingOptions()


def test_another_sampler_does_not_take_over_eta_and_another_grid_replaces_all_of_it() -> None:
    kept = SamplingOptions.from_recipe(NOISY, num_steps=9)
    assert (kept.eta, kept.shift, kept.guidance_interval) == (0.5, 3.0, (0.0, 0.9))
    assert SamplingOptions.from_recipe(NOISY, sampler="ddim").eta == 0.5
    assert SamplingOptions.from_recipe(NOISY, sampler="heun").eta is None
    assert SamplingOptions.from_recipe(NOISY, rho=5.0).shift is None
    assert SamplingOptions.from_recipe(NOISY, grid="uniform").resolved("eps").grid == "uniform"


@pytest.mark.parametrize(
    ("objective", "options", "expected"),
    [
        ("flow", {}, ("euler", None, "uniform", None)),
        ("eps", {}, ("ddim", 0.0, "uniform", None)),
        ("flow", {"sampler": "sde", "grid": "rho"}, ("sde", 1.0, "rho", 7.0)),
        ("flow", {"sampler": "ddpm", "shift": 2.0}, ("ddpm", None, "shift", None)),
        ("eps", {"eta": 0.3, "rho": 5.0}, ("ddim", 0.3, "rho", 5.0)),
        ("x", {}, ("heun", None, "uniform", None)),
    ],
)
def test_resolved_options_leave_nothing_open(objective: str, options: Any, expected: tuple[Any, ...]) -> None:
    found = SamplingOptions(**options).resolved(objective)
    assert (found.sampler, found.eta, found.grid, found.rho) == expected
    assert found.resolved(objective) == found
    assert found.adds_noise == (found.sampler == "ddpm" or bool(found.eta))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("shift", 2.5)),
        ({"grid": "uniform"}, ("uniform", None)),
        ({"shift": 3.0}, ("shift", 3.0)),
        ({"rho": 5.0}, ("rho", None)),
        ({"times": (1.0, 0.5, 0.0)}, ("times", None)),
    ],
)
def test_the_shift_of_training_is_the_grid_where_none_is_chosen(options: Any, expected: tuple[str, Any]) -> None:
    found = SamplingOptions(**options).resolved("flow", 2.5)
    assert (found.grid, found.shift) == expected
    assert found.resolved("flow") == found
    assert (found.settings()["grid"], found.settings()["shift"]) == expected


def test_settings_are_json_that_leads_back() -> None:
    options = SamplingOptions("unipc", 9, 1.5, (0.1, 0.8), "linear", 32, times=(1, 0.5, 0))
    settings = json.loads(json.dumps(options.settings()))
    assert settings == options.settings()
    assert (settings["steps"], settings["times"], settings["guidance_interval"]) == (2, [1.0, 0.5, 0.0], [0.1, 0.8])
    assert SamplingOptions.from_settings(settings) == options
    assert SamplingOptions.from_settings({"sampler": None, "steps": 4, "guidance": 1.0}) == SamplingOptions(
        None, 4, 1.0
    ), "as an earlier version saved them"


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "hein"}, "sampler: Input should be 'ddim', 'ddpm'"),
    ({"grid": "cosine"}, "grid: Input should be 'uniform'"),
    ({"guidance_schedule": "cubic"}, "guidance_schedule: Input should be 'constant'"),
    ({"num_steps": 0}, "num_steps: Input should be greater than 0"),
    ({"guidance": float("nan")}, "guidance: Input should be a finite number"),
    ({"guidance_interval": (0.9, 0.1)}, "guidance_interval: 0.9 is not below 0.1; t is 0 at the data"),
    ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: 0.5 is not below 0.5"),
    ({"guidance_interval": (0.0, 1.5)}, "guidance_interval: Input should be less than or equal to 1"),
    ({"guidance_base_size": 0.0}, "guidance_base_size: Input should be greater than 0"),
    ({"sampler": "heun", "eta": 0.5}, "eta: heun adds no noise; use ddim or sde, or leave it out"),
    ({"sampler": "euler", "eta": 0.0}, "eta: euler adds no noise"),
    ({"sampler": "ddpm", "eta": 1.0}, "eta: ddpm is ddim with eta 1, and takes no other"),
    ({"sampler": "ddim", "eta": 1.5}, "eta: 1.5 is more noise than a step of ddim may add; give 0 to 1"),
    ({"eta": -1.0}, "eta: Input should be greater than or equal to 0"),
    ({"shift": 2.0, "rho": 7.0}, "rho: the grid is shift, which does not read it"),
    ({"grid": "uniform", "shift": 2.0}, "shift: the grid is uniform, which does not read it"),
    ({"grid": "shift"}, "shift: say by how much; for sides s and s0 of pictures or latents it is s / s0"),
    ({"shift": 0.0}, "shift: Input should be greater than 0"),
    ({"grid": "times"}, "times: give at least two, such as 1, 0.5, 0"),
    ({"times": (1.0,)}, "times: give at least two"),
    (
        {"times": (1.0, 0.5, 0.6, 0.0)},
        r"times: they must decrease, from noise \(1\) to data \(0\), and have 0.5 before",
    ),
    ({"times": (0.0, 0.5, 1.0)}, "times: they must decrease"),
    ({"times": (1.0, 0.5, 0.5, 0.0)}, "times: they must decrease"),
    ({"times": (1.0, 0.5)}, "times: the last must be 0, the data, and is 0.5"),
    ({"times": (0.5, 0.0)}, "times: the first must be at least 0.9"),
    ({"times": (1.5, 0.0)}, "times: Input should be less than or equal to 1"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_contradictions_are_one_clear_error_in_python_and_in_a_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^sampling: {message}") as raised:
        SamplingOptions(**options)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValidationError):
        SamplingConfig(**options)


def test_what_depends_on_the_objective_is_noticed_when_it_is_known() -> None:
    with pytest.raises(InputError, match="sampling: eta: euler adds no noise"):
        SamplingOptions(eta=0.5).resolved("flow")
    assert SamplingOptions(eta=0.5).resolved("eps").eta == 0.5
    with pytest.raises(InputError, match="sampling: times: a model of objective eps cannot begin at t = 1"):
        SamplingOptions(times=(1.0, 0.5, 0.0)).resolved("eps")
    assert SamplingOptions(times=(0.999, 0.5, 0.0)).resolved("eps").num_steps == 2


def test_steps_beside_explicit_times_must_agree() -> None:
    recipe = SamplingConfig(times=(1.0, 0.5, 0.2, 0.0))
    assert SamplingOptions.from_recipe(recipe, num_steps=3).num_steps == 3
    with pytest.raises(InputError, match="20 steps are asked for, and the explicit times make 3; leave one of them"):
        SamplingOptions.from_recipe(recipe, num_steps=20)
    assert SamplingOptions.from_recipe(recipe, num_steps=20, grid="uniform").num_steps == 20
