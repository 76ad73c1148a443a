"""Alerts of slow steps, from numbers of rows as the trainer gives them, and a clock of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.config.monitoring import AlertsConfig
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.monitor import Monitor
from pomscale.runs.ledger import Ledger, goodput


def told(folder: Path, rows: list[tuple[float, float]]) -> int:
    """Number of alerts after rows, each (seconds since the row before, seconds per step)."""
    now_s = 0.0
    with Ledger(folder, 0, 0) as ledger:
        alerts = Alerts(AlertsConfig(min_goodput=None), Monitor([]), ledger, lambda: now_s)
        for number, (since_s, step_time_s) in enumerate(rows):
            now_s += since_s
            alerts.check_row(8 * number, step_time_s)
    balance = goodput(folder)
    assert balance is not None
    return balance.events["alert"]


USUAL = [(10.0, 1.0)] * 10


@pytest.mark.parametrize(
    ("rows", "num_told"),
    [
        ([*USUAL, (300.0, 4.0), *USUAL], 0),  # a validation of minutes, and a slow row after it
        ([*USUAL, (300.0, 30.0), *USUAL], 0),  # one step that took minutes
        ([(0.01, 0.01)] * 3000 + [(0.04, 0.04), (0.05, 0.05), (0.2, 0.2)] * 10, 0),  # a busy machine, a row per step
        ([*USUAL, (40.0, 4.0), (40.0, 4.0), (40.0, 4.0)], 1),
    ],
)
def test_hiccups_are_not_told_and_slow_minutes_are(
    rows: list[tuple[float, float]], num_told: int, tmp_path: Path
) -> None:
    assert told(tmp_path, rows) == num_told


@pytest.mark.parametrize(("spent", "num_told"), [({"down": 90_000.0}, 0), ({"start_up": 5_000.0}, 1)])
def test_a_run_that_was_left_alone_has_lost_nothing(spent: dict[str, float], num_told: int, tmp_path: Path) -> None:
    with Ledger(tmp_path, 0, 0) as ledger:
        alerts = Alerts(AlertsConfig(), Monitor([]), ledger)
        ledger._balance.add({"samples": 8, "incarnation": 0, "seconds": {"step": 3_700.0, **spent}})
        alerts.check_row(8, None)
    balance = goodput(tmp_path)
    assert balance is not None
    assert balance.events["alert"] == num_told
