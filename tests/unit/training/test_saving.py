"""Saver: what is saved when, and what is recorded of it."""

from __future__ import annotations

from pathlib import Path

from pomscale.base.clock import Clock
from support.training import BATCH, Desk


def at(step: int) -> Clock:
    return Clock(step * BATCH, step * BATCH)


def test_checkpoints_are_saved_when_due_and_at_the_last_step(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for step in range(1, 8):
        desk.saver.save_checkpoint(at(step), last=step == 7)
    assert desk.of("save checkpoint") == [("save checkpoint", 4 * BATCH), ("save checkpoint", 7 * BATCH)]
    assert desk.of("charge") == [("charge", "checkpoint_stall")] * 2
    first, _ = desk.checkpoints.metas
    assert (first["samples"], first["position"], first["divergence"]["num_rollbacks"]) == (32, 32, 0)


def test_a_checkpoint_that_was_loaded_or_saved_is_not_saved_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.saver.begin_at(4 * BATCH)
    desk.saver.save_checkpoint(at(4), last=True)
    assert desk.of("save checkpoint") == []
    assert desk.of("forget snapshot after") == [("forget snapshot after", 4 * BATCH)]
    desk.saver.save_checkpoint(at(5), last=True)
    desk.saver.save_checkpoint(at(5), last=True)
    assert desk.of("save checkpoint") == [("save checkpoint", 5 * BATCH)]


def test_a_run_that_stops_before_its_first_step_saves_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.saver.begin_at(0)
    desk.saver.save_checkpoint(at(0), last=True)
    assert desk.of("save checkpoint") == []


def test_snapshots_are_saved_when_due_and_at_the_end_unless_they_are_there(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for step in range(1, 11):
        desk.saver.save_snapshot(at(step))
    assert [samples // BATCH for _, samples in desk.of("save snapshot")] == [3, 6, 9, 10]
    there = Desk(tmp_path)
    there.saver.snapshots = type(desk.saver.snapshots)(there.snapshots, 3 * BATCH, holds=lambda samples: True)  # type: ignore[misc]
    there.saver.save_snapshot(at(10))
    there.saver.snapshots = None
    there.saver.save_snapshot(at(10))
    assert there.happened == []


def test_damaged_checkpoints_are_recorded_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for step in (4, 8):
        desk.saver.save_checkpoint(at(step), last=True)
    desk.checkpoints.damage = ["a file was cut off"]
    assert desk.saver.newest(9 * BATCH) == Path(f"samples-{4 * BATCH}")
    assert desk.saver.newest(9 * BATCH) == Path(f"samples-{4 * BATCH}")
    assert desk.of("damaged_checkpoint") == [("damaged_checkpoint", 72, {"reason": "a file was cut off"})]


def test_the_last_save_is_waited_for_and_its_times_are_a_row(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.saver.save_checkpoint(at(10), last=True)
    desk.saver.finish(10 * BATCH)
    assert desk.of("wait checkpoint", "wait snapshot") == [("wait checkpoint",), ("wait snapshot",)]
    assert desk.rows() == [{"samples": 10 * BATCH, "checkpoint/stall_s": 0.5, "checkpoint/total_s": 2.0}]
