from __future__ import annotations

import re

import pytest

from pomscale.config.monitoring import WandbConfig


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WANDB_MODE": "online"}, ["WANDB_MODE is set, and not obeyed: .* its wandb.mode is offline; change it"]),
        ({"WANDB_MODE": "disabled", "WANDB_PROJECT": "other"}, ["WANDB_MODE .* offline", "WANDB_PROJECT .* pomscale"]),
        ({"WANDB_MODE": "offline"}, []),
        ({"WANDB_MODE": "dryrun"}, []),  # an old word for it
        ({"WANDB_MODE": ""}, []),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "offline"}, ["WANDB_DISABLED .* wandb.mode is offline"]),
        ({"WANDB_DISABLED": "false"}, []),
        ({"WANDB_RUN_GROUP": "sweep"}, ["WANDB_RUN_GROUP .* wandb.group is the name of the run"]),
        ({"WANDB_ENTITY": "team"}, []),  # wandb obeys it, since the recipe has none
        ({"WANDB_API_KEY": "x", "WANDB_BASE_URL": "http://here"}, []),
    ],
)  # fmt: skip
def test_variables_that_the_recipe_overrules_are_named(environment: dict[str, str], expected: list[str]) -> None:
    lines = WandbConfig().overruled(environment)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line)


def test_an_entity_of_the_recipe_overrules_that_of_the_environment() -> None:
    (line,) = WandbConfig(entity="mine").overruled({"WANDB_ENTITY": "team"})
    assert "wandb.entity is mine" in line
    assert WandbConfig(mode="disabled").overruled({"WANDB_DISABLED": "1"}) == []
