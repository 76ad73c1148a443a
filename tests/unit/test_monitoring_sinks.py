from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import wandb_reader
from PIL import Image

from pomscale.config.schema import MonitoringConfig, WandbConfig
from pomscale.errors import InputError
from pomscale.monitoring import wandb_sink
from pomscale.monitoring.history import read_history
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.monitoring.sinks import ConsoleSink, JsonlSink
from pomscale.monitoring.wandb_sink import WandbSink


def _refuse_constants(constant: str) -> NoReturn:
    raise AssertionError(f"not JSON: {constant}")


def _rows(run_folder: Path) -> list[dict[str, float | str]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse_constants) for line in lines]


def _log(run_folder: Path, incarnation: int, losses: dict[int, float], start_samples: int | None = None) -> None:
    if start_samples is not None:
        with (run_folder / "incarnations.jsonl").open("a") as file:
            file.write(json.dumps({"incarnation": incarnation, "start_samples": start_samples}) + "\n")
    sink = JsonlSink(run_folder, incarnation)
    for samples, loss in losses.items():
        sink.log(samples, {"train/loss": loss})
    sink.close()


# --- metrics.jsonl and history -------------------------------------------------------------------------------------


def test_rows_are_valid_json_even_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    _log(tmp_path, 3, {8: float("nan"), 16: float("inf"), 24: 0.5})
    rows = _rows(tmp_path)
    assert [row["train/loss"] for row in rows] == ["nan", "inf", 0.5]
    assert rows[0].keys() == {"samples", "time_unix_s", "incarnation", "train/loss"}
    assert rows[0]["incarnation"] == 3
    samples, losses = read_history(tmp_path).series["train/loss"]
    assert samples == [8, 16, 24]
    assert [str(loss) for loss in losses] == ["nan", "inf", "0.5"]


def test_kill_in_the_middle_of_logging_loses_no_finished_row(tmp_path: Path) -> None:
    program = (
        "import itertools, sys; from pathlib import Path; from pomscale.monitoring.sinks import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]), 0)\n"
        "for samples in itertools.count(1):\n"
        "    sink.log(samples, {'train/loss': 1.0 / samples})\n"
        "    print(samples, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    reported = 200 + len(process.stdout.read().splitlines())
    process.wait()
    history = read_history(tmp_path)
    samples, _ = history.series["train/loss"]
    assert samples == list(range(1, len(samples) + 1))
    assert len(samples) >= reported - 1  # the last number may itself be cut off


def test_a_torn_last_line_spoils_neither_the_file_nor_the_next_row(tmp_path: Path) -> None:
    _log(tmp_path, 0, {8: 1.0, 16: 0.9})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    _log(tmp_path, 1, {16: 0.8})
    history = read_history(tmp_path)
    assert history.series["train/loss"] == ([8, 16], [1.0, 0.8])
    assert history.num_unreadable == 1


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullAfterHalfARow:
        def __init__(self, sink: JsonlSink) -> None:
            self.real, self.full = sink._rows._file, False

        def write(self, data: bytes) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.full = True
            return self.real.write(data[:30])

    sink = JsonlSink(tmp_path, 0)
    full = FullAfterHalfARow(sink)
    sink._rows._file = full  # type: ignore[assignment]
    sink.log(8, {"train/loss": 1.0})
    sink.log(16, {"train/loss": 0.9})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    sink._rows._file = full.real
    sink.log(24, {"train/loss": 0.8})
    sink.close()
    assert [row["samples"] for row in _rows(tmp_path)] == [8, 16, 24]


def test_a_resumed_run_supersedes_what_its_predecessor_did_after_the_checkpoint(tmp_path: Path) -> None:
    _log(tmp_path, 0, {8: 1.0, 16: 0.9, 20: 0.8, 24: 0.7, 32: 0.6}, start_samples=0)
    # From the checkpoint at 16: 20 was logged out of turn, 32 is not reached again yet; both were given up.
    _log(tmp_path, 1, {24: 0.71}, start_samples=16)
    history = read_history(tmp_path)
    assert history.series["train/loss"] == ([8, 16, 24], [1.0, 0.9, 0.71])
    assert history.resumed_at == [16]
    _log(tmp_path, 2, {}, start_samples=24)  # killed before its first row
    _log(tmp_path, 3, {16: 0.91}, start_samples=8)
    _log(tmp_path, 1, {32: 9.0})  # a process that outlived its replacement
    history = read_history(tmp_path)
    assert history.series["train/loss"] == ([8, 16], [1.0, 0.91])
    assert history.resumed_at == [8]
    assert [start["incarnation"] for start in history.incarnations] == [0, 1, 2, 3]


def test_a_start_that_was_not_recorded_lies_before_its_first_row(tmp_path: Path) -> None:
    _log(tmp_path, 0, {8: 1.0, 16: 0.9, 24: 0.8}, start_samples=0)
    (tmp_path / "incarnations.jsonl").open("a").write('{"incarnation": 1, "sta')
    _log(tmp_path, 1, {16: 0.91})
    assert read_history(tmp_path).series["train/loss"] == ([8, 16], [1.0, 0.91])


def test_history_of_a_folder_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metrics in"):
        read_history(tmp_path)


# --- console -------------------------------------------------------------------------------------------------------


def test_console_line_and_eta_of_this_incarnation() -> None:
    times = iter([100.0, 110.0])
    stream = io.StringIO()
    sink = ConsoleSink(total_samples=100_000, stream=stream, clock=lambda: next(times))
    sink.log(50_000, {"train/loss": 0.5, "train/learning_rate": 1e-4, "speed/data_wait_share": 0.023})
    sink.log(60_000, {"train/loss": 0.25, "host/cpu_percent": 99.0})
    sink.log_image(60_000, "samples/grid", Path("samples/60000.png"))
    assert stream.getvalue().splitlines() == [
        " 50.0%  50k/100k  loss 0.5000  lr 1.00e-04  data wait 2%  ETA ?",
        " 60.0%  60k/100k  loss 0.2500  ETA 40s",
        " 60.0%  60k/100k  samples/grid: samples/60000.png",
    ]


# --- wandb, real, offline ------------------------------------------------------------------------------------------


def _open(run_folder: Path, incarnation: int) -> Monitor:
    return open_monitor(
        run_folder,
        MonitoringConfig(wandb=WandbConfig(mode="offline", tags=["test"])),
        run_name="digits",
        recipe_dump={"seed": 7, "model": {"dim": 64}},
        total_samples=64,
        incarnation=incarnation,
    )


def test_wandb_gets_what_metrics_jsonl_has_and_a_resumed_run_continues_it(tmp_path: Path) -> None:
    png = tmp_path / "samples" / "000000000016.png"
    png.parent.mkdir()
    Image.new("L", (4, 4)).save(png)
    with _open(tmp_path, 0) as monitor:
        monitor.log(8, {"train/loss": 1.0, "train/grad_norm": 0.5})
        monitor.log_image(16, "samples/grid", png)
    time.sleep(1.0)  # wandb names its folders by the second
    with _open(tmp_path, 1) as monitor:
        monitor.log(16, {"train/loss": float("nan")})

    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    first, second = (wandb_reader.read_rows(path) for path in files)
    assert {key: first[0][key] for key in ("samples", "train/loss", "train/grad_norm")} == {
        "samples": 8,
        "train/loss": 1.0,
        "train/grad_norm": 0.5,
    }
    assert first[1]["samples"] == 16
    assert any(key.startswith("samples/grid") for key in first[1])
    assert (second[0]["samples"], str(second[0]["train/loss"])) == (16, "nan")

    records = wandb_reader.read_records(files[0])
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_id, run.display_name, list(run.tags)) == (run_id, "digits", ["test"])
    assert (config["seed"], config["model"]) == (7, {"dim": 64})
    axes = [record.metric for record in records if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "samples" for metric in axes)

    rows = _rows(tmp_path)
    assert [row["samples"] for row in rows] == [8, 16, 16]
    assert rows[1]["samples/grid"] == "samples/000000000016.png"


def test_a_wandb_that_dies_does_not_kill_the_run(tmp_path: Path) -> None:
    program = (
        "import psutil, sys\n"
        "from pathlib import Path\n"
        "from pomscale.config.schema import WandbConfig\n"
        "from pomscale.monitoring.wandb_sink import WandbSink\n"
        "sink = WandbSink(Path(sys.argv[1]), WandbConfig(mode='offline'), 'digits', {})\n"
        "for child in psutil.Process().children(recursive=True):\n"
        "    child.kill()\n"
        "    child.wait()\n"
        "for samples in (8, 16, 24):\n"
        "    sink.log(samples, {'train/loss': 1.0})\n"
        "sink.close()\n"
        "print('the run goes on')\n"
    )
    own_service = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=own_service, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "the run goes on" in done.stdout
    assert done.stderr.count("rows are missing there") == 1
    assert "wandb missed" in done.stderr


def test_wandb_without_a_key_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="offline or disabled"):
        WandbSink(tmp_path, WandbConfig(mode="online"), "digits", {})


def test_wandb_server_away_falls_back_to_offline_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 1.0)
    sink = WandbSink(tmp_path, WandbConfig(mode="online"), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    sink.close()
    assert "recording offline" in caplog.text
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    (path,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert wandb_reader.read_rows(path)[0]["train/loss"] == 1.0


def test_monitor_closes_every_sink_and_tells_failure_from_a_request_to_stop() -> None:
    closed: list[tuple[str, bool]] = []

    class Sink:
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, samples: int, metrics: dict[str, float | str]) -> None: ...

        def log_image(self, samples: int, name: str, png_path: Path) -> None: ...

        def close(self, failed: bool = False) -> None:
            closed.append((self.name, failed))
            if self.name == "b":
                raise OSError("b cannot be closed")

    with pytest.raises(OSError, match="b cannot"), Monitor([Sink("a"), Sink("b")]):
        raise ValueError("training failed")
    assert sorted(closed) == [("a", True), ("b", True)]
    closed.clear()
    with pytest.raises(SystemExit), Monitor([Sink("a")]):
        sys.exit(75)
    assert closed == [("a", False)]


def test_disabled_wandb_starts_no_process(tmp_path: Path) -> None:
    before = psutil.Process().children()
    monitoring = MonitoringConfig(wandb=WandbConfig(mode="disabled"))
    with open_monitor(tmp_path, monitoring, run_name="a", recipe_dump={}, total_samples=8, incarnation=0) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert psutil.Process().children() == before
    assert not (tmp_path / "wandb").exists()
    assert len(_rows(tmp_path)) == 1
