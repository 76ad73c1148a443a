from __future__ import annotations

import json
import math
import random

import pytest

from pomscale.config.engine import FaultsConfig, LossSpikeConfig
from pomscale.engine.divergence import Divergence

SPIKE = FaultsConfig(loss_spike=LossSpikeConfig(z_score=10.0, num_steps=64), max_rollbacks=2)


def noisy_losses(count: int, scale: float = 0.05) -> list[float]:
    noise = random.Random(0)
    return [1.0 + scale * noise.gauss(0, 1) for _ in range(count)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_steps_that_are_not_finite_are_left_out_until_too_many_come_in_a_row(loss: float, norm: float) -> None:
    divergence = Divergence(FaultsConfig(max_non_finite=3))
    for _ in range(4):  # a good step between them resets the count
        assert [divergence.assess(loss, norm) for _ in range(2)] == ["skip", "skip"]
        assert divergence.assess(1.0, 1.0) == "ok"
    assert [divergence.assess(loss, norm) for _ in range(3)] == ["skip", "skip", "rollback"]
    assert divergence.num_skipped == 11
    divergence.rolled_back()
    assert divergence.assess(loss, norm) == "skip"
    assert "not finite" in divergence.reason


def test_the_run_gives_up_after_its_rollbacks_and_they_are_counted_over_restarts() -> None:
    divergence = Divergence(FaultsConfig(max_rollbacks=2))
    divergence.rolled_back()
    assert divergence.may_roll_back
    assert divergence.assess(math.nan, 1.0) == "skip"
    divergence.rolled_back()
    assert (divergence.num_rollbacks, divergence.may_roll_back) == (2, False)
    assert "positions 64 to 95" in str(divergence.give_up(64, 96, has_checkpoint=True))
    assert "gone back 2 times" in str(divergence.give_up(64, 96, has_checkpoint=True))
    assert "no checkpoint" in str(divergence.give_up(64, 96, has_checkpoint=False))
    assert not Divergence(FaultsConfig(max_rollbacks=0)).may_roll_back


def test_a_spike_is_measured_against_the_losses_before_it() -> None:
    divergence = Divergence(SPIKE)
    losses = noisy_losses(200)
    assert {divergence.assess(loss, 1.0) for loss in losses} == {"ok"}
    assert divergence.assess(1.0 - 0.6, 1.0) == "ok"  # better than ever is no spike
    assert divergence.assess(1.0 + 0.4, 1.0) == "ok"  # 8 sigma
    assert divergence.assess(1.0 + 0.7, 1.0) == "rollback"  # 14 sigma
    assert "1.7 is" in divergence.reason
    # Judged bad, it is not among the good losses: a run of bad ones does not become the measure.
    assert [divergence.assess(1.0 + 0.7, 1.0) for _ in range(100)] == ["rollback"] * 100


def test_no_spike_before_the_window_is_full_nor_after_a_rollback_until_it_is_again() -> None:
    divergence = Divergence(SPIKE)
    for _ in range(2):
        assert {divergence.assess(loss, 1.0) for loss in noisy_losses(63)} == {"ok"}
        assert divergence.assess(9.0, 1.0) == "ok"  # the 64th
        assert divergence.assess(9.0, 1.0) == "rollback"
        divergence.rolled_back()
    assert Divergence(FaultsConfig()).assess(1e9, 1.0) == "ok"  # no detector asked for


@pytest.mark.parametrize("level", [0.0, 1.0, -2.0])
def test_losses_without_any_spread(level: float) -> None:
    """The median absolute deviation is 0: a change within the last digits is no spike, a large one is."""
    divergence = Divergence(SPIKE)
    for _ in range(64):
        divergence.assess(level, 1.0)
    assert divergence.assess(level + 1e-3 * abs(level), 1.0) == "ok"
    assert divergence.assess(level + 5.0, 1.0) == "rollback"


def test_a_falling_loss_with_little_noise_never_spikes() -> None:
    """Large batches: noise of a thousandth, and a learning rate that moves the loss up and down by a few percent."""
    divergence = Divergence(SPIKE)
    losses = [math.exp(-step / 500) + 0.3 + 0.02 * math.sin(step / 40) for step in range(3000)]
    noise = noisy_losses(3000, 1e-3)
    assert {divergence.assess(a * b, 1.0) for a, b in zip(losses, noise, strict=True)} == {"ok"}


def test_what_a_checkpoint_keeps_judges_as_if_it_had_not_been_interrupted() -> None:
    whole, first = Divergence(SPIKE), Divergence(SPIKE)
    steps = [(1.0 + 0.01 * (i % 7), 1.0) for i in range(70)] + [(math.nan, 1.0), (50.0, 1.0), (1.0, 1.0)]
    verdicts = [whole.assess(*step) for step in steps]
    assert {"ok", "skip", "rollback"} == set(verdicts)
    for cut in range(len(steps)):
        first = Divergence(SPIKE)
        before = [first.assess(*step) for step in steps[:cut]]
        then = Divergence(SPIKE, json.loads(json.dumps(first.dump())))
        assert before + [then.assess(*step) for step in steps[cut:]] == verdicts
    assert then.num_skipped == whole.num_skipped == 1
