"""Logging survives a library that exits, a rollback and a torn file."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

from pomscale.base.background import Background
from pomscale.base.jsonl import read_json_lines
from pomscale.monitoring.sinks import ConsoleSink
from pomscale.runs.evaluation_log import Delivery
from pomscale.runs.ledger import Ledger


def test_a_library_that_wants_to_exit_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []
    background = Background("a log")
    background.do(lambda: sys.exit(3))
    background.do(lambda: made.append(1))
    background.finish(lambda: made.append(2))
    assert background.join(time.monotonic() + 60.0)
    assert made == [1, 2]
    assert "a log fails; the run goes on" in caplog.text


def test_the_eta_survives_a_rollback_beyond_its_first_row() -> None:
    now_s, shown = 0.0, io.StringIO()
    sink = ConsoleSink(2000, shown, lambda: now_s)
    for samples in (1100, 1200, 1000, 1100):
        now_s += 10.0
        sink.log(samples, {"train/loss": 1.0})
    assert [line.rpartition("ETA ")[2] for line in shown.getvalue().splitlines()] == ["?", "1m 20s", "?", "1m 30s"]


def test_what_is_torn_is_no_object(tmp_path: Path) -> None:
    start = '{"samples": 0, "time_unix_s": 1, "incarnation": 1, "start": {"process_unix_s": 1.0}}'
    (tmp_path / "events.jsonl").write_text(f"{start}\n12\n")
    (tmp_path / "evaluations.jsonl").write_text("12\n")
    rows, num_unreadable = read_json_lines(tmp_path / "events.jsonl")
    assert (len(rows), num_unreadable) == (1, 1)
    Ledger(tmp_path, 2, 0).close()
    assert list(Delivery(tmp_path).due()) == []
