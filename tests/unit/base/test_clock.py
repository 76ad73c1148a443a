"""Samples and positions: equal until a step is left out."""

from __future__ import annotations

import json

import pytest

from pomscale.base.clock import Clock

BATCH = 4


def run(clock: Clock, steps: str) -> Clock:
    """One letter per step: "+" taken, "-" left out."""
    for step in steps:
        (clock.take if step == "+" else clock.leave_out)(BATCH)
    return clock


@pytest.mark.parametrize(
    ("steps", "samples", "position", "skipped"),
    [
        ("+++", 12, 12, []),
        ("+-+--+", 12, 24, [(4, 8), (12, 20)]),
        ("--", 0, 8, [(0, 8)]),
    ],
)
def test_what_is_left_out_moves_the_position_alone(
    steps: str, samples: int, position: int, skipped: list[tuple[int, int]]
) -> None:
    assert run(Clock(), steps) == Clock(samples, position, skipped)


def test_going_back_leaves_out_all_since_then_and_never_meets_that_data_again() -> None:
    then = run(Clock(), "+-++")
    now = run(Clock.of(then.dump()), "+-+---")
    now.go_back(then)
    assert now == Clock(12, 40, [(4, 8), (16, 40)])
    # Again, before anything new was saved: one range more of the same data.
    run(now, "++")
    now.go_back(then)
    assert now == Clock(12, 48, [(4, 8), (16, 48)])
    assert then == Clock(12, 16, [(4, 8)]), "the checkpoint's own clock has changed"
    # To where the last step before it was left out, too: the ranges are one.
    then = run(Clock(), "+-")
    now = run(Clock.of(then.dump()), "++-")
    now.go_back(then)
    assert now.skipped == [(4, 20)]


def test_going_back_to_now_changes_nothing() -> None:
    now = run(Clock(), "+-+")
    now.go_back(Clock.of(now.dump()))
    assert now == run(Clock(), "+-+")


@pytest.mark.parametrize("steps", ["", "+", "+-+--+"])
def test_a_clock_comes_back_from_json(steps: str) -> None:
    """Every position is either counted or skipped."""
    clock = run(Clock(), steps)
    assert Clock.of(json.loads(json.dumps(clock.dump()))) == clock
    assert clock.samples + sum(end - first for first, end in clock.skipped) == clock.position
