"""The same run on any layout: equal losses on 1, 2, 3 and 4 processes, with and without accumulation.

Other engines and modes: test_parity.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import assert_same_curve, losses, train, write_tiny_recipe


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process without accumulation: what all others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    train(write_tiny_recipe(folder, digits))
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(
    ("num_processes", "overrides"),
    [
        pytest.param(2, [], id="2 processes"),
        pytest.param(4, [], id="4 processes", marks=pytest.mark.exhaustive),
        # 32 samples on 3 ranks are 10, 11 and 11; in micro-batches of at most 4, some of 3 and some of 4
        pytest.param(3, ["training.micro_batch=4"], id="3 uneven processes", marks=pytest.mark.exhaustive),
        # micro-batches of 10 and none, and of 6 and 5
        pytest.param(
            3, ["training.micro_batch=10"], id="3 processes with an empty micro-batch", marks=pytest.mark.slow
        ),
        # slices of 4 and 5 samples in 5 micro-batches: some ranks have an empty one
        pytest.param(7, ["training.micro_batch=1"], id="7 uneven processes", marks=pytest.mark.exhaustive),
        pytest.param(1, ["training.micro_batch=5"], id="accumulation on one"),
    ],
)
def test_loss_curve_does_not_depend_on_the_layout(
    alone: Path, tiny_recipe: Path, num_processes: int, overrides: list[str]
) -> None:
    train(tiny_recipe, *overrides, num_processes=num_processes)
    assert_same_curve(losses(tiny_recipe.parent / "runs" / "tiny"), losses(alone))


@pytest.mark.exhaustive
def test_losses_of_attention_agree_too(tiny_recipe: Path) -> None:
    train(tiny_recipe, "model.mixer=attention", "name=one")
    train(tiny_recipe, "model.mixer=attention", "name=two", num_processes=2)
    runs = tiny_recipe.parent / "runs"
    assert_same_curve(losses(runs / "two"), losses(runs / "one"))
