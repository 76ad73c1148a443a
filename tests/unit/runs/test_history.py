from __future__ import annotations

from pathlib import Path

from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs.history import read_history


def test_a_rollback_gives_up_what_lies_beyond(tmp_path: Path) -> None:
    """Also what the run has not reached again yet, and what it never measures there again."""
    sink = JsonlSink(tmp_path, 0)
    for samples in (10, 20, 30, 40):
        sink.log(samples, {"train/loss": float(samples)})
    sink.log(40, {"validation/loss": 9.0})
    sink.log(20, {"faults/rollbacks": 1})
    assert read_history(tmp_path).series["train/loss"] == ([10, 20], [10.0, 20.0])
    sink.log(30, {"train/loss": 3.0})
    sink.close()
    series = read_history(tmp_path).series
    assert series["train/loss"] == ([10, 20, 30], [10.0, 20.0, 3.0])
    assert series["faults/rollbacks"] == ([20], [1.0])
    assert "validation/loss" not in series
