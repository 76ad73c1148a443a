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
import running
from running import GLOBAL_BATCH, TIMEOUT_S, outcome, rows, started, train, train_command

from pomscale.quickstart import samples_seen

sys.path.append(str(Path(__file__).parent.parent / "unit"))
import wandb_reader

OFFLINE = "monitoring.wandb.mode=offline"


def _start_and_signal(recipe: Path, folder: Path, after_steps: int, number: signal.Signals) -> int:
    """The exit code. Training alone gets the signal: the process that wandb has started is not told."""
    with started(train_command(recipe, OFFLINE), stderr=subprocess.STDOUT) as process:
        while samples_seen(folder) < after_steps * GLOBAL_BATCH:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
    return process.returncode


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def test_three_starts_are_one_wandb_run_with_the_rows_of_metrics_jsonl(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    assert _start_and_signal(tiny_recipe, folder, 12, signal.SIGTERM) == 75
    monkeypatch.setitem(running.ENVIRONMENT, "POMSCALE_RESTARTED_BECAUSE", "time limit")
    assert _start_and_signal(tiny_recipe, folder, 32, signal.SIGKILL) == -signal.SIGKILL
    monkeypatch.setitem(running.ENVIRONMENT, "POMSCALE_RESTARTED_BECAUSE", "node n7 went down")
    train(tiny_recipe, OFFLINE)
    assert outcome(folder)["state"] == "finished"

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (folder / "wandb_id.txt").read_text().strip()
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 3
    for incarnation, path in enumerate(files, start=1):
        ours = [row for row in rows(folder) if row["incarnation"] == incarnation and "train/loss" in row]
        theirs = [row for row in wandb_reader.read_rows(path) if "train/loss" in row]
        # The kill has cost wandb what its process had not written yet: the last second or two.
        assert len(theirs) == len(ours) > 5 or incarnation == 2
        for our, their in zip(ours, theirs, strict=False):
            assert (their["samples"], their["train/loss"]) == (our["samples"], our["train/loss"])
    alerts = [
        (record.alert.title, record.alert.level, record.alert.text)
        for path in files
        for record in wandb_reader.read_records(path)
        if record.HasField("alert")
    ]
    starts = [json.loads(line)["start_samples"] for line in (folder / "incarnations.jsonl").read_text().splitlines()]
    assert alerts[-1] == ("requeued", "INFO", f"going on from {starts[2]:,} samples: node n7 went down")
    kept = [(row["incarnation"], row["title"]) for row in _events(folder, "alert")]
    assert kept == [(2, "requeued"), (3, "requeued")]
    artifacts = [record.artifact.type for record in wandb_reader.read_records(files[2]) if record.HasField("artifact")]
    assert sorted(artifacts) == ["code", "recipe"]
