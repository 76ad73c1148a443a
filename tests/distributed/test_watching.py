"""A real run as wandb and its own folder show it, over a stop, a kill and steps that are not finite."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pomscale.runs.history import samples_seen
from support import running, wandb_reader
from support.running import GLOBAL_BATCH, TIMEOUT_S, outcome, rows, run, started

WORKER = Path(__file__).with_name("faulty_train.py")
OFFLINE = "monitoring.wandb.mode=offline"


# wandb's own process may be slow to write out what is left.
PATIENCE = {"close_timeout_s": 120}


def _command(recipe: Path, *faults: dict[str, Any]) -> list[str]:
    return [sys.executable, str(WORKER), json.dumps([PATIENCE, *faults]), str(recipe), OFFLINE]


def _start_and_kill(recipe: Path, folder: Path, after_steps: int, num_steps: int, num_files: int) -> int:
    """Kill training after `after_steps` steps of its own, once wandb has begun its file; return the exit code.

    The process that wandb has started is not killed.
    """
    waiting = {"do": "sleep", "at": "step", "nth": num_steps + 1}
    with started(_command(recipe, waiting), stderr=subprocess.STDOUT) as process:
        deadline_s = time.monotonic() + TIMEOUT_S
        while samples_seen(folder) < after_steps * GLOBAL_BATCH or len(_wandb_files(folder)) < num_files:
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
    return process.returncode


def _wandb_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def test_three_starts_are_one_wandb_run_with_the_rows_of_metrics_jsonl(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    run(_command(tiny_recipe, {"do": "send", "number": "SIGTERM", "at": "step", "nth": 8}), expect=75)
    monkeypatch.setitem(running.ENVIRONMENT, "POMSCALE_RESTARTED_BECAUSE", "time limit")
    assert _start_and_kill(tiny_recipe, folder, 22, num_steps=14, num_files=2) == -signal.SIGKILL
    monkeypatch.setitem(running.ENVIRONMENT, "POMSCALE_RESTARTED_BECAUSE", "node n7 went down")
    run(_command(tiny_recipe))
    assert outcome(folder)["state"] == "finished"

    files = _wandb_files(folder)
    run_id = (folder / "wandb_id.txt").read_text().strip()
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 3
    for number, path in enumerate(files, start=1):
        ours = [row for row in rows(folder) if row["incarnation"] == number and "train/loss" in row]
        theirs = [row for row in wandb_reader.read_rows(path) if "train/loss" in row]
        # The kill has cost wandb what its process had not written yet: the last second or two.
        assert len(theirs) == len(ours) > 5 or number == 2
        for our, their in zip(ours, theirs, strict=False):
            assert (their["samples"], their["train/loss"]) == (our["samples"], our["train/loss"])
    alerts = [
        (record.alert.title, record.alert.level, record.alert.text)
        for path in files
        for record in wandb_reader.read_records(path)
        if record.HasField("alert")
    ]
    starts = [json.loads(line)["start_samples"] for line in (folder / "incarnations.jsonl").read_text().splitlines()]
    assert alerts[-1] == ("requeued", "INFO", f"continuing from {starts[2]:,} samples: node n7 went down")
    kept = [(row["incarnation"], row["title"]) for row in _events(folder, "alert")]
    assert kept == [(2, "requeued"), (3, "requeued")]
    artifacts = [record.artifact.type for record in wandb_reader.read_records(files[2]) if record.HasField("artifact")]
    assert sorted(artifacts) == ["code", "recipe"]
