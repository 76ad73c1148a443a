"""A wandb that dies, hangs or refuses, a full disk, and a server on this machine that goes away."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pomscale.base.errors import InputError
from pomscale.config.monitoring import WandbConfig
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.wandb import sink as wandb_sink
from pomscale.monitoring.wandb.sink import WandbSink
from pomscale.runs.wandb_id import own_wandb_id, read_wandb_id, replace_wandb_id
from support import wandb_reader
from support.running import mounted_disk
from support.wandb_folder import (
    RECIPE,
    environment_without_wandb,
    logged_samples,
    open_wandb,
    wait_until_written,
    wandb_files,
    wandb_services,
)
from support.wandb_server import KEY, wandb_server
from support.wandb_store import wandb_store


def kill_wandb() -> None:
    """Kill wandb's processes, and no others: servers of other tests are children of this process, too."""
    for service in wandb_services():
        for process in [*service.children(recursive=True), service]:
            process.kill()
            process.wait()


def test_a_wandb_that_dies_is_started_again_and_misses_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 1.0)
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    kill_wandb()
    for samples in (16, 24):
        sink.log(samples, {"train/loss": 1.0})
    time.sleep(1.0)
    sink.log(32, {"train/loss": 1.0})
    sink.close()
    before, after = logged_samples(run)
    assert set(before) | set(after) == {8, 16, 24, 32}
    assert after == [8, 16, 24, 32]  # 8 was on its way when it died
    ours = [record.message.split("(")[0] for record in caplog.records if record.name.startswith("pomscale")]
    assert ours == ["wandb fails "]


def test_a_wandb_that_dies_after_the_last_row_is_started_again_at_the_end(run: Path) -> None:
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    kill_wandb()
    sink.close()
    assert logged_samples(run)[-1] == [8]


def test_rows_wait_while_the_disk_is_full_and_none_is_missing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_LOOK_FOR_ROOM_EVERY_S", 0.2)
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 0.2)
    with mounted_disk(tmp_path / "disk", "2m") as run:
        (run / "recipe.yaml").write_text(RECIPE)
        sink = WandbSink(run, WandbConfig(), "digits", {})
        wide = {f"train/metric_{index}": 0.5 for index in range(50)}
        for samples in range(1, 101):
            sink.log(samples, {"train/loss": 1.0, **wide})
            if samples == 40:
                time.sleep(1.5)  # what was given so far is on disk
                filler = run / "filler"
                with pytest.raises(OSError, match="No space left"):
                    filler.write_bytes(bytes(4 << 20))
            if samples == 80:
                filler.unlink()
                time.sleep(0.3)
            time.sleep(0.01)
        sink.close()
        assert set().union(*logged_samples(run)) == set(range(1, 101))
        assert caplog.text.count("wandb fails (OSError(28, 'No space left on device')): rows wait") == 1
        assert "missed" not in caplog.text


def test_a_disk_that_stays_full_costs_wandb_its_rows_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as run:
        monitor = open_wandb(run)
        for samples in (8, 16, 24):
            monitor.log(samples, {"train/loss": 1.0})
        monitor.close()
        assert not wandb_files(run)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert "wandb missed 3 entries; metrics.jsonl has every row" in caplog.text


def test_what_wandb_refuses_for_good_does_not_hold_up_the_rest(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_RETRY_EVERY_S", 0.0)
    sink = WandbSink(run, WandbConfig(), "digits", {})
    sink.log(8, {"train/loss": 1.0})
    sink.log(16, {"train/loss": object()})  # type: ignore[dict-item]
    for samples in (24, 32):
        sink.log(samples, {"train/loss": 1.0})
    sink.close()
    assert set().union(*logged_samples(run)) >= {8, 24, 32}


def test_a_service_that_hangs_holds_up_neither_rows_nor_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_module, "CLOSE_TIMEOUT_S", 6.0)
    monitor = open_wandb(run)
    monitor.log(1, {"train/loss": 1.0})
    while not wandb_files(run):
        time.sleep(0.05)
    (service,) = wandb_services()
    service.send_signal(signal.SIGSTOP)
    try:
        wide = {f"train/metric_{index}": 0.5 for index in range(200)}
        for samples in range(2, 1000):  # more than a socket takes
            monitor.log(samples, {"train/loss": 1.0, **wide})
        wait_until_written(lambda: (run / "metrics.jsonl").read_bytes().count(b"\n") == 999)
        monitor.close()  # the service would never answer
        assert "wandb has not ended within 6 s: what was not sent is in RUN/wandb" in caplog.text
    finally:
        service.send_signal(signal.SIGKILL)
        service.wait()


def test_wandb_without_a_key_is_an_input_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(run / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="offline or disabled"):
        WandbSink(run, WandbConfig(mode="online"), "digits", {})


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_server_away_at_the_start_falls_back_to_offline_under_the_same_id(
    how: str, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init = wandb_run.WandbRun._init
    waited_s: list[float] = []

    def init_online_in_a_second(self: wandb_run.WandbRun, mode: Any) -> Any:
        with monkeypatch.context() as patch:
            if mode == "online":
                patch.setattr(wandb_run, "INIT_TIMEOUT_S", 1.0)
            start_s = time.perf_counter()
            try:
                return init(self, mode)
            finally:
                waited_s.append(time.perf_counter() - start_s)

    monkeypatch.setattr(wandb_run.WandbRun, "_init", init_online_in_a_second)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url if how == "hangs" else "http://127.0.0.1:9")
        server.hangs = True
        sink = WandbSink(run, WandbConfig(mode="online"), "digits", {})
        sink.log(8, {"train/loss": 1.0})
        sink.close()
    assert waited_s[0] < 60.0, "wandb itself waits for 90 s"
    assert "recording offline" in caplog.text
    (path,) = (run / "wandb").glob(f"offline-run-*/run-{read_wandb_id(run)}.wandb")
    assert wandb_reader.read_rows(path)[0]["train/loss"] == 1.0


def test_a_run_that_was_deleted_on_the_server_goes_on_as_another(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 8.0)  # wandb asks again until then
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    deleted = own_wandb_id(run)
    with wandb_store() as store:
        monkeypatch.setenv("WANDB_BASE_URL", store.url)
        store.deleted.add(deleted)
        sink = WandbSink(run, WandbConfig(mode="online"), "digits", {})
        sink.log(8, {"train/loss": 1.0})
        sink.close()
        new = read_wandb_id(run)
        assert new is not None
        assert store.samples(new) == [8]
    assert new != deleted
    assert f"the wandb run {deleted} is not continued: it was deleted on wandb's server" in caplog.text
    assert "away" not in caplog.text


def test_another_process_may_have_found_the_run_deleted_meanwhile(run: Path) -> None:
    own_wandb_id(run)
    opening = wandb_run.WandbRun(run, WandbConfig(mode="offline"), "digits", {})
    new = replace_wandb_id(run, "it was deleted on wandb's server")
    opening.open().finish()
    opening.close()
    assert [folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")] == [new]


PROGRAM = """
import os, sys, time
from pathlib import Path
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.monitoring import monitor as monitor_module
from pomscale.monitoring.wandb import run as wandb_run
from pomscale.monitoring.monitor import open_monitor
wandb_run.INIT_TIMEOUT_S = 120.0
monitor_module.CLOSE_TIMEOUT_S = 4.0
config = MonitoringConfig(wandb=WandbConfig(mode="online"))
monitor = open_monitor(Path(sys.argv[1]), config, run_name="digits", recipe_dump={}, total_samples=64, start=0)
monitor.log(1, {"train/loss": 1.0})
time.sleep(2)
print("open", flush=True)
sys.stdin.readline()
held_s = []
for samples in range(2, 101):
    start_s = time.perf_counter()
    monitor.log(samples, {"train/loss": 1.0})
    held_s.append(time.perf_counter() - start_s)
    time.sleep(0.01)
sys.stdin.readline()
start_s = time.perf_counter()
monitor.close()
print(max(held_s), time.perf_counter() - start_s, flush=True)
os._exit(0)  # as the command line does
"""


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_server_away_later_leaves_every_row_in_the_folder_and_lets_the_run_end(how: str, run: Path) -> None:
    with wandb_server() as server:
        environment = {**environment_without_wandb(), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(run)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stdin is not None
        assert program.stdout is not None
        while program.stdout.readline() != "open\n":
            assert program.poll() is None
        assert "UpsertBucket" in server.requests
        if how == "hangs":
            server.hangs = True
        else:
            server.go_away()
        program.stdin.write("\n")
        program.stdin.flush()
        wait_until_written(lambda: logged_samples(run) == [list(range(1, 101))])
        out, err = program.communicate("\n", timeout=200)
    held_s, close_s = map(float, out.splitlines()[-1].split())
    assert program.returncode == 0
    assert held_s < 20.0, "it waited for the server, which would take minutes"
    assert 3.5 < close_s < 60.0, "wandb itself tries for minutes"
    assert "wandb has not ended within 4 s: what was not sent is in RUN/wandb" in err
    assert logged_samples(run) == [list(range(1, 101))]
    assert wandb_files(run)[0].parent.name.startswith("run-")
