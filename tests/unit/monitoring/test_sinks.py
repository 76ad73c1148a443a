from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from pomscale.base.errors import InputError
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.monitor import Monitor, open_monitor
from pomscale.monitoring.sinks import ConsoleSink, JsonlSink
from pomscale.runs.history import read_history
from support.running import wait_until


def _refuse_constants(constant: str) -> NoReturn:
    raise AssertionError(f"not JSON: {constant}")


def _rows(run_folder: Path) -> list[dict[str, float | str]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse_constants) for line in lines]


def _log(run_folder: Path, start: int, losses: dict[int, float], start_samples: int | None = None) -> None:
    if start_samples is not None:
        with (run_folder / "incarnations.jsonl").open("a") as file:
            file.write(json.dumps({"incarnation": start, "start_samples": start_samples}) + "\n")
    sink = JsonlSink(run_folder, start)
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
    assert [start["incarnation"] for start in history.starts] == [0, 1, 2, 3]


def test_a_start_that_was_not_recorded_lies_before_its_first_row(tmp_path: Path) -> None:
    _log(tmp_path, 0, {8: 1.0, 16: 0.9, 24: 0.8}, start_samples=0)
    (tmp_path / "incarnations.jsonl").open("a").write('{"incarnation": 1, "sta')
    _log(tmp_path, 1, {16: 0.91})
    assert read_history(tmp_path).series["train/loss"] == ([8, 16], [1.0, 0.91])


def test_history_of_a_folder_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metrics in"):
        read_history(tmp_path)


# --- console -------------------------------------------------------------------------------------------------------


def test_console_line_and_eta_of_this_start() -> None:
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


def test_alerts_videos_and_pictures_on_the_console_and_in_metrics_jsonl(tmp_path: Path) -> None:
    stream = io.StringIO()
    console, jsonl = ConsoleSink(total_samples=100, stream=stream, clock=lambda: 0.0), JsonlSink(tmp_path, 0)
    for sink in (console, jsonl):
        sink.log_video(50, "samples/clip", tmp_path / "samples" / "50.mp4")
        sink.alert(50, "not finite", "loss nan", "WARN")
    jsonl.close()
    clip, alert = stream.getvalue().splitlines()
    assert clip == f" 50.0%  50/100  samples/clip: {tmp_path}/samples/50.mp4"
    assert alert == " 50.0%  50/100  WARN  not finite: loss nan"
    assert [row.get("samples/clip") for row in _rows(tmp_path)] == ["samples/50.mp4"]  # alerts are in events.jsonl


# --- Monitor -------------------------------------------------------------------------------------------------------


def wait_for_rows(run_folder: Path, count: int) -> None:
    """Until they are in metrics.jsonl: its thread writes them, and may not get to it for a while."""
    metrics = run_folder / "metrics.jsonl"
    wait_until(lambda: metrics.read_bytes().count(b"\n") >= count, "rows are held up", timeout_s=90)


class Recorder:
    """A sink that keeps what it gets. `block`: its first row waits for that; `begun`: it has it."""

    if_cut_off = "nothing"
    is_slow_to_close = False

    def __init__(self, name: str, block: threading.Event | None = None) -> None:
        self.name = name
        self._block = block
        self.begun = threading.Event()
        self.rows: list[int] = []
        self.closed: list[bool] = []

    def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None:
        self.begun.set()
        if self._block is not None:
            self._block.wait(240)
        if self.name == "broken":
            raise OSError("the disk is gone")
        self.rows.append(samples)

    def log_image(self, samples: int, name: str, path: Path) -> None: ...

    log_video = log_image

    def alert(self, samples: int, title: str, text: str, level: str) -> None: ...

    def close(self, failed: bool = False) -> None:
        self.closed.append(failed)
        if self.name == "broken":
            raise OSError("it cannot be closed either")


def test_monitor_closes_every_sink_and_tells_failure_from_a_request_to_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sinks = [Recorder("broken"), Recorder("whole")]
    monitor = Monitor(sinks)
    monitor.log(8, {"train/loss": 1.0})
    monitor.log(16, {})  # nothing to log
    monitor.log(24, {"train/loss": 1.0})
    with pytest.raises(ValueError, match="training failed"), monitor:
        raise ValueError("training failed")
    assert [sink.closed for sink in sinks] == [[True], [True]]
    assert sinks[1].rows == [8, 24]
    assert caplog.text.count("OSError: the disk is gone") == 1  # told once, counted to the end
    assert "broken lacks 3 entries: 0 were dropped, 3 failed, 0 are left behind" in caplog.text
    sink = Recorder("whole")
    with pytest.raises(SystemExit), Monitor([sink]):
        sys.exit(75)
    assert sink.closed == [False]


def test_a_sink_that_hangs_holds_up_neither_the_run_nor_the_other_sinks_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 0.5)
    for_ever = threading.Event()
    hung = Recorder("hung", for_ever)
    monitor = Monitor([hung, JsonlSink(tmp_path, 0)])
    for samples in range(1, 5001):
        monitor.log(samples, {"train/loss": 1.0})
        if samples == 1:
            assert hung.begun.wait(60)  # it has one row in hand, beside those that wait
        if samples % 1000 == 0:
            wait_for_rows(tmp_path, samples)
    monitor.close()  # waiting for that sink, neither would ever return
    assert [row["samples"] for row in _rows(tmp_path)] == list(range(1, 5001))
    assert caplog.text.count("hung does not keep up") == 1
    assert "hung lacks 4999 entries: 903 were dropped, 0 failed, 4096 are left behind" in caplog.text
    assert "hung has not ended within 0.5 s: nothing" in caplog.text
    for_ever.set()


@pytest.mark.parametrize("in_a_hurry", [False, True])
def test_a_sink_that_is_slow_to_close_has_time_if_nobody_waits(
    in_a_hurry: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else wandb's offline record is cut off on a busy machine."""
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 0.0)
    may_close = threading.Event()
    sink = Recorder("slow", may_close)
    sink.is_slow_to_close = True

    def look() -> bool:
        looks.append(0)
        if len(looks) == 3:
            may_close.set()  # after CLOSE_TIMEOUT_S
        return in_a_hurry

    looks: list[int] = []
    monitor = Monitor([sink], look)
    monitor.log(8, {"train/loss": 1.0})
    monitor.close()
    assert ("slow has not ended within 0 s" in caplog.text) == in_a_hurry
    assert (sink.closed == [False]) == (not in_a_hurry)
    may_close.set()


def test_a_console_whose_reader_has_stopped_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 0.5)
    reader, writer = os.pipe()
    monitor = Monitor([ConsoleSink(10_000, os.fdopen(writer, "w")), JsonlSink(tmp_path, 0)])
    for samples in range(2000):  # the pipe takes 64 KiB
        monitor.log(samples, {"train/loss": 1.0})
    wait_for_rows(tmp_path, 2000)
    start_s = time.perf_counter()
    monitor.close()  # waiting for the reader, it would never return
    assert time.perf_counter() - start_s > 0.4
    assert len(_rows(tmp_path)) == 2000
    os.close(reader)


def test_rows_bear_the_time_at_which_they_were_logged_not_written(tmp_path: Path) -> None:
    block = threading.Event()

    class Slow(JsonlSink):
        def log(self, samples: int, metrics: dict[str, float | str], time_unix_s: float | None = None) -> None:
            block.wait(60)
            super().log(samples, metrics, time_unix_s)

    monitor = Monitor([Slow(tmp_path, 0)])
    before = time.time()
    monitor.log(8, {"train/loss": 1.0})
    logged = time.time()
    time.sleep(0.3)
    block.set()
    monitor.close()
    assert before - 0.001 <= float(_rows(tmp_path)[0]["time_unix_s"]) <= logged + 0.001  # in milliseconds


def test_a_kill_costs_what_is_in_the_queue(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from pomscale.monitoring.monitor import Monitor; from pomscale.monitoring.sinks import JsonlSink\n"
        "monitor = Monitor([JsonlSink(Path(sys.argv[1]), 0)])\n"
        "for samples in range(1, 101):\n"
        "    monitor.log(samples, {'train/loss': 1.0 / samples})\n"
        "while Path(sys.argv[1], 'metrics.jsonl').read_bytes().count(b'\\n') < 100:\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=120)
    assert read_history(tmp_path).series["train/loss"][0] == list(range(1, 101))


def test_disabled_wandb_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")  # the recipe decides, and says so
    before = set(psutil.Process().children())
    monitoring = MonitoringConfig(wandb=WandbConfig(mode="disabled"))
    with open_monitor(tmp_path, monitoring, run_name="a", recipe_dump={}, total_samples=8, start=0) as monitor:
        monitor.log(8, {"train/loss": 1.0})
    assert set(psutil.Process().children()) <= before  # what other tests have left may end meanwhile
    assert not (tmp_path / "wandb").exists()
    assert len(_rows(tmp_path)) == 1
    assert caplog.text.count("WANDB_MODE is set, and not obeyed") == 1
