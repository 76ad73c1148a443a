"""Evaluations of checkpoints that reach wandb, from training or in a session of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.wandb.run import WandbLock
from pomscale.monitoring.wandb.sink import deliver_without_training
from pomscale.runs.evaluation_log import Delivery, record
from pomscale.runs.result_settings import result_key
from support import wandb_reader
from support.wandb_folder import (
    RECIPE,
    logged_samples,
    open_wandb,
    wait_until_written,
    wandb_files,
)


def test_evaluations_reach_wandb_once_at_their_own_samples_over_restarts(run: Path) -> None:
    picture = run / "grid.png"
    Image.new("L", (4, 4)).save(picture)
    with open_wandb(run, 0) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        record(run, 8, {"evaluation/digits/accuracy": 0.5}, {"evaluation/digits/grid": picture})
        monitor.log(16, {"train/loss": 0.5})
        monitor.log(24, {"train/loss": 0.25})
    with open_wandb(run, 1) as monitor:
        monitor.log(32, {"train/loss": 0.125})
        record(run, 16, {"evaluation/digits/accuracy": 0.75})  # after the last row: at the end
    with open_wandb(run, 2) as monitor:
        monitor.log(40, {"train/loss": 0.0625})
    assert logged_samples(run, "evaluation/digits/accuracy") == [[8], [16], []]
    rows = [row for path in wandb_files(run) for row in wandb_reader.read_rows(path)]
    assert any(key.startswith("evaluation/digits/grid") for row in rows for key in row)
    tables = [json.loads(path.read_text()) for path in sorted((run / "wandb").rglob("*.table.json"))]
    columns = ["samples", "digits/accuracy"]
    assert {(tuple(table["columns"]), len(table["data"])) for table in tables} == {
        (tuple(columns), 1),
        (tuple(columns), 2),
    }
    assert "evaluation" not in (run / "metrics.jsonl").read_text()


def test_wandb_has_the_settings_and_another_curve_where_they_differ(run: Path) -> None:
    other = {"sampler": {"steps": 25}}
    with open_wandb(run, 0) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        record(run, 8, {"evaluation/images/fid": 9.0}, settings={"sampler": {"steps": 50}})
        record(run, 8, {"evaluation/images/fid": 7.0}, settings=other)
        monitor.log(16, {"train/loss": 0.5})
    curve = f"evaluation/images@{result_key(other)}"
    assert logged_samples(run, "evaluation/images/fid") == [[8]]
    assert logged_samples(run, f"{curve}/fid") == [[8]]
    config = wandb_reader.read_config(wandb_files(run)[0])
    assert config["evaluation/images"] == {"sampler": {"steps": 50}}
    assert config[curve] == other


def test_without_training_evaluations_go_to_wandb_in_a_session_of_their_own(run: Path) -> None:
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0  # the run has no wandb run yet
    with open_wandb(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert deliver_without_training(run) == 0  # training gave it
    record(run, 16, {"evaluation/digits/accuracy": 0.75})
    record(run, 24, {"evaluation/digits/accuracy": 0.875})
    assert deliver_without_training(run) == 2
    assert deliver_without_training(run) == 0
    record(run, 32, {"evaluation/digits/accuracy": 1.0})
    assert deliver_without_training(run) == 1  # at once: another folder all the same
    assert logged_samples(run, "evaluation/digits/accuracy") == [[8], [16, 24], [32]]
    assert len({path.name for path in wandb_files(run)}) == 1  # one wandb run
    (run / "recipe.yaml").write_text(RECIPE + "monitoring: {wandb: {mode: disabled}}\n")
    record(run, 40, {"evaluation/digits/accuracy": 1.0})
    assert deliver_without_training(run) == 0


def test_a_wandb_that_refuses_does_not_refuse_the_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_wandb(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    (run / "recipe.yaml").write_text(RECIPE + "monitoring: {wandb: {mode: online}}\n")
    monkeypatch.setenv("HOME", str(run))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0
    assert "wandb refuses to start" in caplog.text
    monkeypatch.undo()
    (run / "recipe.yaml").write_text(RECIPE)
    assert deliver_without_training(run) == 1  # it was left for the next delivery


def test_while_training_is_alive_it_is_training_that_delivers(run: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from pomscale.config.monitoring import WandbConfig; from pomscale.monitoring.wandb.sink import WandbSink\n"
        "sink = WandbSink(Path(sys.argv[1]), WandbConfig(), 'digits', {})\n"
        "sink.log(8, {'train/loss': 1.0})\n"
        "print('alive', flush=True)\n"
        "sys.stdin.readline()\n"
        "sink.log(16, {'train/loss': 1.0})\n"
        "time.sleep(240)\n"
    )
    training = subprocess.Popen(
        [sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert training.stdin is not None
    assert training.stdout is not None
    assert training.stdout.readline() == "alive\n"
    record(run, 8, {"evaluation/digits/accuracy": 0.5})
    assert deliver_without_training(run) == 0
    training.stdin.write("\n")
    training.stdin.close()
    wait_until_written(lambda: logged_samples(run) == [[8, 16]] and not Delivery(run).has_more)  # given, and noted
    training.kill()
    training.wait()
    time.sleep(wandb_run._NAME_EVERY_S)  # the next one shall have another name
    record(run, 16, {"evaluation/digits/accuracy": 0.75})
    assert deliver_without_training(run) == 1  # the kernel has taken the lock from it
    assert logged_samples(run, "evaluation/digits/accuracy") == [[8], [16]]


def test_training_waits_for_who_brings_an_evaluation_just_then(run: Path) -> None:
    lock = WandbLock(run)
    assert lock.take()
    with open_wandb(run) as monitor:
        monitor.log(8, {"train/loss": 1.0})
        time.sleep(0.5)
        assert not wandb_files(run)
        lock.release()
        wait_until_written(lambda: bool(wandb_files(run)))
        assert not WandbLock(run).take()
    assert logged_samples(run) == [[8]]
    assert WandbLock(run).take()
