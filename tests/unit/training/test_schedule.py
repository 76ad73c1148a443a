"""Schedule: what is due after which step, and the figures that go with a step."""

from __future__ import annotations

import pytest

from pomscale.base.clock import Clock
from pomscale.config.engine import EmaConfig, ScheduleConfig
from pomscale.training.schedule import Schedule


def schedule(**shape: int) -> Schedule:
    return Schedule(
        total_samples=100, global_batch=7, peak=2.0, shape=ScheduleConfig.model_validate(shape), ema=EmaConfig()
    )


def test_a_step_that_passes_a_multiple_is_due_once() -> None:
    ends = [7 * step for step in range(1, 15)]
    assert [end for end in ends if schedule().is_due(20, Clock(end))] == [21, 42, 63, 84]
    assert [end for end in ends if schedule().is_due(14, Clock(end))] == [14, 28, 42, 56, 70, 84, 98]
    assert all(schedule().is_due(1, Clock(end)) for end in ends)


def test_a_run_is_over_when_all_its_samples_are_seen_and_the_last_batch_may_go_beyond() -> None:
    assert [end for end in (91, 98, 100, 105) if schedule().is_over(end)] == [100, 105]


def test_learning_rates_are_those_in_the_middle_of_a_step() -> None:
    warm_up = schedule(warmup_samples=10)
    assert warm_up.learning_rate_from(0, 7) == pytest.approx(2.0 * 3 / 10)  # not 0
    assert warm_up.learning_rate_to(Clock(7)) == pytest.approx(2.0 * 4 / 10)
    assert warm_up.learning_rate_to(Clock()) == 0.0  # no step was taken
    cooldown = schedule(warmup_samples=0, cooldown_samples=10)
    assert 0.0 < cooldown.learning_rate_from(93, 7) < 2.0


def test_packed_steps_go_by_their_own_samples() -> None:
    packed = Schedule(100, None, 2.0, ScheduleConfig(warmup_samples=10), EmaConfig())
    clock, due = Clock(), []
    assert not packed.is_due(20, clock)
    for step in (7, 12, 3, 30, 1, 40, 7):
        assert packed.left(clock.samples) >= step
        clock.take(step, steps_differ=True)
        due.append(packed.is_due(20, Clock.of(clock.dump())))  # also at a checkpoint
    assert due == [False, False, True, True, False, True, True]
    assert packed.is_over(clock.samples)
    assert packed.learning_rate_from(0, 8) == pytest.approx(2.0 * 4 / 10)
    assert packed.learning_rate_to(Clock(8, 8, [], 6)) == pytest.approx(2.0 * 5 / 10)


def test_averages_go_by_the_end_of_the_step() -> None:
    (share,) = {round(share, 6) for share in schedule().ema_weights_from(0, 7).values()}
    assert share == pytest.approx(1.0, abs=1e-3)
    assert all(0.0 < later < share for later in schedule().ema_weights_from(10_000, 7).values())
