from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pomscale.runs.layout import EVENTS_FILE
from pomscale.runs.ledger import SUBMITTED, Ledger, goodput
from pomscale.runs.metric_names import WALL_TIME, describe


def write(folder: Path, *rows: dict[str, Any]) -> None:
    """Lines as a ledger writes them; the time of a line is of no account."""
    with (folder / EVENTS_FILE).open("a") as file:
        for row in rows:
            file.write(json.dumps({"time_unix_s": 0, **row}) + "\n")


def seconds(folder: Path) -> dict[str, float]:
    """Seconds by kind in the ledger, without kinds that took no time."""
    found = goodput(folder)
    assert found is not None
    return {kind: pytest.approx(value) for kind, value in found.seconds.items() if value}


def start(number: int, samples: int, **moments: float) -> dict[str, Any]:
    return {"incarnation": number, "samples": samples, "start": moments}


def spent(number: int, samples: int, **times: float) -> dict[str, Any]:
    return {"incarnation": number, "samples": samples, "seconds": times}


def test_a_run_of_three_starts(tmp_path: Path) -> None:
    write(
        tmp_path,
        start(0, 0, submitted_unix_s=1000, job_unix_s=1600, process_unix_s=1610),
        spent(0, 100, start_up=20, compile=10, step=50, data_wait=5),
        spent(0, 200, step=50, checkpoint_stall=5, evaluation=10),  # until 1760, then killed; its checkpoint is at 150
        # Requeued, with the old time of submission: it waited from the kill on.
        start(1, 150, submitted_unix_s=1000, job_unix_s=1900, process_unix_s=1905),
        spent(1, 250, start_up=5, step=60),  # until 1970, then the node was rebooted
        {"incarnation": 1, "samples": 250, "event": "damaged_checkpoint"},
        start(2, 50, submitted_unix_s=2100, job_unix_s=2300, process_unix_s=2300),  # a person submitted it again
        spent(2, 300, step=30),
    )
    assert seconds(tmp_path) == {
        "productive": 25 + 30,  # of 50 s to 100 samples half, and the last start
        "lost": 25 + 25 + 25 + 60,
        "queue": 600 + 140 + 200,
        "down": 130,
        "start_up": 10 + 20 + 5 + 5,
        "compile": 10,
        "data_wait": 5,
        "checkpoint_stall": 5,
        "evaluation": 10,
    }
    found = goodput(tmp_path)
    assert found is not None
    assert sum(found.seconds.values()) == pytest.approx(2330 - 1000)  # all wall time, once
    assert found.productive_share == pytest.approx(55 / 1330)
    assert found.events == {"damaged_checkpoint": 1}
    assert found.metrics()["goodput/lost_share"] == pytest.approx(135 / 1330)
    assert all(describe(name) for name in found.metrics())


def test_a_restart_inside_the_allocation_has_not_queued(tmp_path: Path) -> None:
    job = {"submitted_unix_s": 900, "job_unix_s": 1000}
    write(
        tmp_path,
        start(0, 0, **job, process_unix_s=1000),
        spent(0, 100, step=50),
        start(1, 100, **job, process_unix_s=1080),
        spent(1, 200, step=50),
    )
    assert seconds(tmp_path) == {"productive": 100, "queue": 100, "down": 30}


def test_nothing_is_known_of_the_job(tmp_path: Path) -> None:
    write(tmp_path, start(0, 0, process_unix_s=1000), spent(0, 100, step=50), start(1, 0, process_unix_s=1060))
    assert seconds(tmp_path) == {"lost": 50, "down": 10}


def test_a_rollback_loses_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    write(
        tmp_path,
        start(0, 0, process_unix_s=1000),
        spent(0, 100, step=10),
        spent(0, 200, step=10),
        {"incarnation": 0, "samples": 200, "event": "rollback", "to_samples": 120},
        spent(0, 220, step=10, rollback=3),
        start(1, 170, process_unix_s=1040),  # half of what came after the rollback
    )
    assert seconds(tmp_path) == {"productive": 10 + 2 + 5, "lost": 8 + 5, "rollback": 3, "down": 7}


def test_torn_lines_and_a_process_that_outlived_its_replacement(tmp_path: Path) -> None:
    write(tmp_path, start(0, 0, process_unix_s=1000), spent(0, 100, step=10))
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"incarnation": 0, "samp')
    ledger = Ledger(tmp_path, 1, 100)
    write(tmp_path, spent(0, 900, step=1e6))
    ledger.close()
    assert seconds(tmp_path)["productive"] == 10
    assert goodput(tmp_path / "elsewhere") is None


# Tells what its sleeps really took: on a busy machine, seconds now and then.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from pomscale.runs.ledger import Ledger
time.sleep(0.3)
waits, steps = [], []
with Ledger(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])) as ledger:
    ledger.charge("start_up")
    charged = time.monotonic()
    for samples in range(int(sys.argv[3]) + 8, int(sys.argv[4]) + 8, 8):
        for kind, took, sleep_s in (("data_wait", waits, 0.02), ("step", steps, 0.04)):
            time.sleep(sleep_s)
            ledger.charge(kind)
            before, charged = charged, time.monotonic()
            took.append(charged - before)
        if samples % 32 == 0:
            ledger.write(samples)
    ledger.event("stop_requested", samples, signal="SIGTERM")
    ended = time.time()
    written = threading.Event()  # a thread writes
    ledger._writer.do(written.set)
    assert written.wait(60)
    print(json.dumps({"ended": ended, "waits": waits, "steps": steps}), flush=True)
    if sys.argv[5] == "hang":
        time.sleep(60)
"""


def test_real_processes_account_for_all_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.time()
    submitted = begun - 5.0
    monkeypatch.setenv(SUBMITTED, str(submitted))
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = run("0", "0", "64", "hang")
    started = time.time()  # at the latest
    assert killed.stdout is not None
    first = json.loads(killed.stdout.readline())
    killed.kill()
    killed.wait()
    second = json.loads(run("1", "32", "96", "end").communicate(timeout=120)[0])
    gone = time.time()

    found = seconds(tmp_path)
    tick = 0.02  # what the start of a process is known to
    total = sum(value.expected for value in found.values())
    assert second["ended"] - submitted - tick <= total <= gone - submitted + tick
    assert begun - submitted - tick <= found["queue"].expected <= started - submitted + tick
    # Of 8 steps, the 4 beyond the checkpoint at 32 were done again.
    assert found["lost"].expected == pytest.approx(sum(first["steps"][4:]), rel=0.2)
    assert found["productive"].expected == pytest.approx(sum(first["steps"][:4] + second["steps"]), rel=0.2)
    assert found["start_up"].expected > 0.6  # from the start of the process, its imports included
    assert found["data_wait"].expected == pytest.approx(sum(first["waits"] + second["waits"]), rel=0.2)
    rows = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [row["samples"] for row in rows if row["incarnation"] == 0 and "seconds" in row] == [32, 64]
    assert rows[-2]["event"] == "stop_requested"


def test_a_full_disk_stops_nothing_and_no_line_is_lost(tmp_path: Path) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger = Ledger(tmp_path, 0, 0)
    assert ledger._file is not None
    real, ledger._file._file = ledger._file._file, Full()  # type: ignore[assignment]
    ledger.charge("step")
    ledger.write(8)
    ledger.event("rollback", 8, to_samples=0)
    has_tried = threading.Event()
    ledger._writer.do(has_tried.set)
    assert has_tried.wait(60)
    ledger._file._file = real
    ledger.close()
    rows = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [next(key for key in ("start", "seconds", "event") if key in row) for row in rows] == [
        "start",
        "seconds",
        "event",
        "seconds",
    ]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Ledger(None, 0, 0) as ledger:
        ledger.charge("step")
        ledger.event("rollback", 8, to_samples=0)
        ledger.write(8)
        assert ledger.metrics() == {}
    assert not list(tmp_path.iterdir())


def test_every_kind_has_a_meaning(tmp_path: Path) -> None:
    write(tmp_path, start(0, 0, process_unix_s=1000))
    found = goodput(tmp_path)
    assert found is not None
    assert list(found.seconds) == list(WALL_TIME)
    assert found.productive_share == 0.0
