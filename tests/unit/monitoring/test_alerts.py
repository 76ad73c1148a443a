"""Alerts: when they are sent, by numbers, and their texts, through the real sinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pomscale.config.monitoring import AlertsConfig
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.monitor import Monitor
from pomscale.runs.ledger import Ledger


class Told:
    """A sink, of alerts alone."""

    name, if_cut_off = "told", ""
    is_slow_to_close = False

    def __init__(self) -> None:
        self.alerts: list[tuple[int, str, str, str]] = []

    def log(self, *arguments: Any) -> None: ...

    log_image = log_video = log

    def alert(self, samples: int, title: str, text: str, level: str) -> None:
        self.alerts.append((samples, title, text, level))

    def close(self, failed: bool = False) -> None: ...


class Desk:
    """Alerts under a clock of its own, on a ledger whose seconds are given."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.now_s = 0.0
        self.told = Told()
        self.folder = folder
        self.monitor = Monitor([self.told])
        self.ledger = Ledger(folder, 0, 0)
        self.alerts = Alerts(
            AlertsConfig.model_validate({"min_goodput": None, **config}), self.monitor, self.ledger, lambda: self.now_s
        )

    def spend(self, **seconds: float) -> None:
        """Into the ledger's balance, as if they had passed."""
        row = {"samples": self.ledger._balance.samples + 8, "incarnation": 0, "seconds": seconds}
        self.ledger._balance.add(row)

    def close(self) -> list[tuple[int, str, str, str]]:
        self.monitor.close()
        self.ledger.close()
        return self.told.alerts

    def events(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row.get("event") == "alert"]


def test_steps_that_are_not_finite_are_told_once_an_hour_with_their_number(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for hour in (0, 1):
        for minute in range(3):
            desk.now_s = 3600 * hour + 60 * minute
            desk.alerts.left_out(640 + hour, "loss nan and gradient norm 1: not finite")
    desk.alerts.went_back(900, 320, "loss 9 is 20.0 robust standard deviations above its median 1")
    assert desk.close() == [
        (640, "not finite", "a step is left out at 640 samples: loss nan and gradient norm 1: not finite", "WARN"),
        (
            641,
            "not finite",
            "a step is left out at 641 samples: loss nan and gradient norm 1: not finite "
            "(and 2 times since the last alert)",
            "WARN",
        ),
        (
            320,
            "rollback",
            "from 900 back to 320 samples: loss 9 is 20.0 robust standard deviations above its median 1",
            "WARN",
        ),
    ]
    assert [(row["samples"], row["title"], row["level"]) for row in desk.events()] == [
        (640, "not finite", "WARN"),
        (641, "not finite", "WARN"),
        (320, "rollback", "WARN"),
    ]


def test_a_restart_is_told_with_its_reason_and_a_first_start_is_not(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.alerts.restarted(0, None)
    desk.alerts.restarted(12_800, "node n7 went down")
    assert desk.close() == [(12_800, "requeued", "continuing from 12,800 samples: node n7 went down", "INFO")]


def test_steps_that_stay_slow_are_told_by_the_median_of_this_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path, stall_factor=3.0)
    # Ten steps a row. The first one compiled; one hiccup is no stall; then a minute of slow rows is.
    for row, step_time_s in enumerate([9.0, 1.0, 1.0, 1.1, 0.9, 1.0, 1.0, 2.9, 3.2, 1.0, 3.2, 3.3]):
        desk.now_s += 10 * step_time_s
        desk.alerts.check_row(8 * row, step_time_s)
    desk.alerts.check_row(96, None)  # no step since the last row
    text = "at 88 samples, for 65 s: 3.3 s per step, 3.3 times the median of this start"
    assert desk.close() == [(88, "slow steps", text, "WARN")]


def test_a_few_rows_are_no_median_and_no_factor_means_no_alert(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    few, never = Desk(tmp_path / "few"), Desk(tmp_path, stall_factor=None)
    for desk, num_rows in ((few, 4), (never, 20)):
        for step_time_s in [0.1] * num_rows + [10.0]:
            desk.now_s += 1000 * step_time_s
            desk.alerts.check_row(8, step_time_s)
    assert few.close() == never.close() == []


def test_no_step_at_all_is_told_from_another_thread(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.alerts.check_row(640, 1.0)
    desk.alerts.late("no step for 300 s")
    assert desk.close() == [(640, "stall", "after 640 samples: no step for 300 s", "ERROR")]


@pytest.mark.parametrize("queue_s", [0, 90_000])
@pytest.mark.parametrize(("productive_s", "is_told"), [(1900, True), (2100, False)])
def test_goodput_below_the_limit_without_counting_the_queue(
    tmp_path: Path, productive_s: float, is_told: bool, queue_s: float
) -> None:
    desk = Desk(tmp_path, min_goodput=0.5, goodput_after_s=3600)
    desk.spend(queue=queue_s, start_up=1500)
    desk.alerts.check_row(8, 1.0)  # 0 %, but too early to judge
    desk.spend(step=productive_s, data_wait=2500 - productive_s)
    desk.alerts.check_row(16, 1.0)
    text = "48% of 1h 06m went into steps that count, wanted 50%; most of the rest is start_up, 25m 00s"
    assert desk.close() == ([(16, "goodput", text, "WARN")] if is_told else [])


def test_the_ranks_that_log_nothing_tell_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    alerts = Alerts(AlertsConfig(goodput_after_s=1e-9), Monitor([]), Ledger(None, 0, 0))
    alerts.restarted(8, "preempted")
    alerts.check_row(16, 1.0)
    alerts.late("no step for 300 s")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
