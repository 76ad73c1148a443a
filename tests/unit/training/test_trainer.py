"""The loop: in which order its collaborators act, by what became of each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pomscale.base.clock import Clock
from pomscale.training.periodic import Event, PeriodicWork
from pomscale.training.step import TrainStep
from pomscale.training.trainer import Trainer
from support.training import BATCH, Desk

GOOD, BAD = (1.0, 1.0), (math.nan, math.nan)


def trainer(desk: Desk, *, stop_at: int | None = None, sizes: Sequence[int] = ()) -> Trainer:
    """With an event every five steps; a stop is requested while step `stop_at` waits for its batch.

    sizes: samples of each step, for packed ones.
    """

    def event(samples: int) -> dict[str, float | str]:
        desk.happened.append(("event", samples))
        return {"validation/loss": 2.0}

    def batches() -> Any:
        for step in itertools.count(1):
            desk.stop.requested = desk.stop.requested or step == stop_at
            batch = SimpleNamespace(bad=(), first=lambda num_samples: SimpleNamespace(bad=(), cut_to=num_samples))
            yield TrainStep([batch], sizes[step - 1] if sizes else BATCH)

    periodic = PeriodicWork(
        [Event("validation", 5 * BATCH, event)],
        desk.checkpoints.record_metrics,
        5 * BATCH,
        desk.engine,
        "halflife-200",
        desk.schedule,
        desk.process,
        desk.records,
    )
    return Trainer(
        engine=desk.engine,
        steps=batches(),
        loss=lambda model, batch: pytest.fail("the engine of lists computes no loss"),
        schedule=desk.schedule,
        saver=desk.saver,
        recovery=desk.recovery,
        telemetry=desk.telemetry,
        periodic=periodic,
        process=desk.process,
    )


def test_a_run_to_its_end(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, figures=[GOOD] * 10), Clock()
    trainer(desk).run(clock)
    assert clock.samples == clock.position == 10 * BATCH
    assert [samples // BATCH for _, samples in desk.of("save checkpoint")] == [4, 8, 10]
    assert [samples // BATCH for _, samples in desk.of("save snapshot")] == [3, 6, 9, 10]
    assert [row["samples"] // BATCH for row in desk.rows() if "train/loss" in row] == [2, 4, 6, 8, 10]
    names = ("step", "compare replicas", "save checkpoint", "save snapshot", "averaged", "event", "record metrics")
    last = [name for name, *_ in desk.of(*names)][-7:]
    assert last == ["step", *names[1:]], "saved before the events"
    assert [name for name, *_ in desk.happened[-4:]] == ["wait checkpoint", "wait snapshot", "charge", "write"]


def packed(desk: Desk) -> Desk:
    desk.schedule = replace(desk.schedule, global_batch=None)
    desk.saver.schedule = desk.schedule
    return desk


def test_the_clock_goes_by_the_samples_of_each_packed_step(tmp_path: Path) -> None:
    """One step is left out and one is taken back: their whole samples are passed over. The last one is cut at 80."""
    figures = [GOOD, GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD, GOOD, GOOD, GOOD]
    desk, clock = packed(Desk(tmp_path, figures=figures)), Clock()
    trainer(desk, sizes=[10, 5, 7, 20, 3, 11, 13, 9, 21, 6, 30]).run(clock)
    # 10 + 5, 7 skipped, 20 -> 35 and a checkpoint, 3 -> 38, 11 skipped, 13 back to 35; then 9, 21, 6 and 9 of 30.
    assert clock.skipped == [(15, 22), (42, 69)]
    assert (clock.samples, clock.position, clock.last_step) == (80, 114, 9)
    assert [samples for _, samples in desk.of("save checkpoint")] == [35, 65, 80]
    assert [meta["last_step"] for meta in desk.checkpoints.metas] == [20, 21, 9]
    assert [samples for _, samples in desk.of("save snapshot")] == [35, 65, 80]


def test_a_skipped_step_is_neither_logged_nor_followed_by_work(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, figures=[GOOD] * 4 + [BAD] + [GOOD] * 6), Clock()
    trainer(desk).run(clock)
    assert (clock.samples, clock.position) == (10 * BATCH, 11 * BATCH)
    assert [samples // BATCH for _, samples in desk.of("save checkpoint")] == [4, 8, 10]
    assert [row["samples"] // BATCH for row in desk.rows() if "train/loss" in row] == [2, 4, 6, 8, 10]


def test_a_rollback_takes_the_steps_since_the_checkpoint_again(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, figures=[GOOD] * 5 + [BAD] * 2 + [GOOD] * 6), Clock()
    trainer(desk).run(clock)
    assert (clock.samples, clock.position) == (10 * BATCH, 13 * BATCH)
    assert clock.skipped == [(4 * BATCH, 7 * BATCH)]
    assert [samples // BATCH for _, samples in desk.of("event")] == [5, 5, 10]


def test_a_stop_saves_and_leaves_the_events_to_the_next_start(tmp_path: Path) -> None:
    desk, clock = Desk(tmp_path, figures=[GOOD] * 5), Clock()
    trainer(desk, stop_at=5).run(clock)
    assert clock.samples == 5 * BATCH
    assert [samples // BATCH for _, samples in desk.of("save checkpoint")] == [4, 5]
    assert desk.of("event") == []
    assert desk.of("stop_requested")[0][2] == {"signal": "at another rank"}
    assert desk.rows()[-2]["samples"] == 5 * BATCH

    desk.happened.clear()
    desk.stop.requested = False
    desk.engine.figures = iter([GOOD] * 5)
    trainer(desk).run(clock)
    assert [samples // BATCH for _, samples in desk.of("event")] == [5, 10]


def test_a_stop_before_the_first_step_does_nothing_unless_the_run_is_over(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.stop.requested = True
    trainer(desk).run(Clock(5 * BATCH, 5 * BATCH))
    assert desk.of("step", "event", "save checkpoint", "save snapshot") == []
    trainer(desk).run(Clock(10 * BATCH, 10 * BATCH))
    assert desk.of("step", "event", "save checkpoint") == [("event", 10 * BATCH)]


def test_an_error_waits_for_the_save_under_way(tmp_path: Path) -> None:
    desk = Desk(tmp_path, figures=[GOOD] * 4)
    with pytest.raises(RuntimeError):  # StopIteration of the fifth step
        list(_step_by_step(trainer(desk)))
    assert desk.happened[-1] == ("wait checkpoint",)


def _step_by_step(of: Trainer) -> Any:
    of.run(Clock())
    yield
