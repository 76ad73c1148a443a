"""Options of sampling: the recipe's, unless something else is asked for."""

from __future__ import annotations

import pytest

from pomscale.config.sampling import SamplingConfig
from pomscale.diffusion.options import SamplingChanges, SamplingOptions

RECIPE = SamplingConfig(sampler="heun", num_steps=7, guidance=1.5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, SamplingOptions("heun", 7, 1.5)),
        ({"sampler": None, "num_steps": None, "guidance": None}, SamplingOptions("heun", 7, 1.5)),
        ({"sampler": "ddim", "num_steps": 3}, SamplingOptions("ddim", 3, 1.5)),
        ({"guidance": 0.0}, SamplingOptions("heun", 7, 0.0)),
    ],
)
def test_what_is_not_asked_for_is_as_in_the_recipe(changes: SamplingChanges, expected: SamplingOptions) -> None:
    assert SamplingOptions.from_recipe(RECIPE, **changes) == expected


def test_the_defaults_are_those_of_a_recipe_that_says_nothing() -> None:
    assert SamplingOptions.from_recipe(SamplingConfig()) == SamplingOptions()
