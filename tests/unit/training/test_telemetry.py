"""Telemetry: the rows of metrics, and what the time of a step is charged to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.base.clock import Clock
from pomscale.monitoring.throughput import StepTimer
from pomscale.runs.metric_names import describe
from pomscale.runs.starts import Superseded
from support.training import BATCH, Desk


def test_a_row_has_the_means_since_the_row_before(tmp_path: Path) -> None:
    desk, now_s = Desk(tmp_path), [0.0]
    desk.telemetry.timer = StepTimer(lambda: now_s[0])
    for loss, norm in ((1.0, 2.0), (2.0, 4.0)):
        now_s[0] += 2.0
        desk.telemetry.count_step(loss, norm, BATCH)
    with desk.telemetry.timer.paused():
        now_s[0] += 100.0
    desk.telemetry.log(Clock(16, 24))
    desk.telemetry.log(Clock(16, 32))
    row, empty = desk.rows()
    assert (row["samples"], row["train/loss"], row["train/grad_norm"], row["data/epoch"]) == (16, 1.5, 3.0, 0.24)
    assert (row["speed/samples_per_s"], row["speed/step_time_s"], row["speed/mfu"]) == (4.0, 2.0, 0.004)
    assert not [name for name in empty if name.startswith(("train/", "speed/"))], "no step was taken since"
    assert all(describe(name) for name in row if "/" in name)
    assert desk.of("write") == [("write", 16)] * 2


def test_the_first_step_of_a_process_is_charged_as_compilation(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    batches = iter([["a"], ["b"]])
    for expected in (["a"], ["b"]):
        assert desk.telemetry.next_batch(batches, 0) == expected
        desk.telemetry.charge_step()
    assert [kind for _, kind in desk.of("charge")] == ["other", "data_wait", "compile", "other", "data_wait", "step"]


def test_a_row_is_only_written_by_the_newest_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path)

    def check() -> None:
        raise Superseded("a newer start has taken over")

    desk.start.check = check
    with pytest.raises(Superseded):
        desk.telemetry.log(Clock())
    assert desk.rows() == []
