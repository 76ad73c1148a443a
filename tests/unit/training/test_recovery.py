"""Recovery: which steps are skipped, when the run rolls back, and when it gives up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pomscale.base.clock import Clock
from pomscale.base.errors import PomscaleError
from pomscale.data.bad_samples import BadSample
from pomscale.training.recovery import StepOutcome
from support.training import BATCH, Desk

NAN = math.nan


def step(desk: Desk, clock: Clock, loss: float, norm: float) -> StepOutcome:
    verdict = desk.recovery.assess(clock.samples, loss, norm)
    return desk.recovery.carry_out(verdict, clock, norm, BATCH)


def test_a_good_step_is_taken_and_left_to_the_caller_to_count(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path), Clock(8, 16)
    assert step(desk, clock, 1.0, 1.0) is StepOutcome.TAKEN
    assert (clock.samples, clock.position, desk.happened) == (8, 16, [])


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    desk, clock = Desk(tmp_path), Clock(8, 16)
    assert step(desk, clock, 1.0, NAN) is StepOutcome.SKIPPED
    assert (clock.samples, clock.position, clock.skipped) == (8, 24, [(16, 24)])
    written, skipped = desk.happened  # what was charged before belongs to the good steps
    assert written == ("write", 8)
    assert skipped[:2] == ("skipped_step", 8)
    assert skipped[2]["position"] == 16
    assert "the step at position 16 is left out: loss 1 and gradient norm nan: not finite" in capsys.readouterr().err
    desk.records.monitor.close()
    assert desk.sink.alerts == ["not finite"]


def test_several_in_a_row_roll_back_past_the_data_since(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path), Clock(4 * BATCH, 4 * BATCH)
    desk.saver.save_checkpoint(clock, last=True)
    clock.take(BATCH)
    desk.telemetry.count_step(9.0, 9.0, BATCH)
    assert step(desk, clock, NAN, NAN) is StepOutcome.SKIPPED
    assert step(desk, clock, NAN, NAN) is StepOutcome.ROLLED_BACK
    assert (clock.samples, clock.position, clock.skipped) == (32, 56, [(32, 56)])
    (rollback,) = desk.of("rollback")
    assert (rollback[1], rollback[2]["to_samples"]) == (40, 32)
    assert desk.divergence.num_rollbacks == 1
    assert desk.happened[-2:] == [("forget snapshot after", 32), ("charge", "rollback")]
    desk.saver.save_checkpoint(clock, last=True)
    assert len(desk.checkpoints.metas) == 1, "what was restored is saved already"
    desk.telemetry.log(clock)
    fault, row = desk.rows()
    assert fault == {"samples": 32, "faults/rollbacks": 1}
    assert "train/loss" not in row, "the step of loss 9 does not count any more"
    assert desk.sink.alerts == ["not finite", "rollback"]


def test_a_run_that_may_not_roll_back_again_gives_up(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, max_non_finite=1, max_rollbacks=1), Clock(BATCH, BATCH)
    desk.saver.save_checkpoint(clock, last=True)
    assert step(desk, clock, NAN, NAN) is StepOutcome.ROLLED_BACK
    with pytest.raises(PomscaleError, match=r"at global positions 16 to 23, and the run has gone back 1 times already"):
        step(desk, clock, NAN, NAN)


def test_without_a_checkpoint_a_spike_counts_and_what_is_not_finite_is_the_end(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, max_non_finite=1), Clock()
    for _ in range(16):
        assert step(desk, clock, 1.0, 1.0) is StepOutcome.TAKEN
    assert desk.divergence.assess(100.0, 1.0) == "rollback"
    assert step(desk, clock, 100.0, 1.0) is StepOutcome.TAKEN
    assert (clock.position, clock.skipped) == (0, [])
    with pytest.raises(PomscaleError, match=r"positions 0 to 7, and there is no checkpoint to go back to"):
        step(desk, clock, NAN, NAN)


def test_bad_samples_are_listed_until_there_are_too_many(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    bad = [BadSample("fingerprint", "somewhere", record, "#", f"record {record} is damaged") for record in range(2)]
    desk.recovery.note_bad_samples(8, bad[:1])
    desk.recovery.note_bad_samples(16, bad[:1])
    assert desk.recovery.bad_samples.known == [("fingerprint", 0)]
    with pytest.raises(PomscaleError, match="record 1 is damaged"):
        desk.recovery.note_bad_samples(24, bad)
