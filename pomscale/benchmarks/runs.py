"""`pomscale bench runs`: how long the table of many runs takes, from the command to its last line.

The folders are such as runs leave: written by the same code, several starts each, some finished, some failed, some that
seem to run elsewhere. Their metrics are as long as asked for, since the table must not depend on that.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from launch.record.job import JOBS_FILE, Start, Submission, Verdict, attempt_folder, keep
from launch.status.runs import find_runs, summarize
from pomscale.base.jsonl import JsonLines
from pomscale.benchmarks.report import BenchReport
from pomscale.runs import starts
from pomscale.runs.layout import METRICS_FILE, STARTS_FILE, claim_path
from pomscale.runs.metric_names import METRICS, WALL_TIME, goodput_share
from pomscale.runs.outcome import write_outcome

_WANTED_S = 1.0
_NUM_STARTS, _NUM_TURNS = 4, 5
_BATCH = 256


def bench_runs(*, num_runs: int, num_rows: int) -> BenchReport:
    """num_rows: of the metrics of each run."""
    report = BenchReport("runs")
    with tempfile.TemporaryDirectory(prefix="pomscale-bench-") as temporary:
        folder = Path(temporary)
        states = _make_runs(folder, num_runs, num_rows)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report.add("folders", runs=num_runs, rows=num_rows, gib=num_bytes / 2**30)
        command = [sys.executable, "-m", "pomscale", "runs", str(folder), "--json"]
        _check(subprocess.run(command, capture_output=True, text=True, check=True).stdout, states, num_rows)
        commands = [_seconds(command) for _ in range(_NUM_TURNS)]
        report.add("the command", seconds=statistics.median(commands), slowest_s=max(commands))
        begin_s = time.perf_counter()
        summarize(find_runs(folder))
        report.add("of that, reading the folders", seconds=time.perf_counter() - begin_s)
        start_up = [_seconds([sys.executable, "-c", "import launch.status.table"]) for _ in range(_NUM_TURNS)]
        report.add("of that, Python and imports", seconds=statistics.median(start_up))
    report.judge(f"seconds for {num_runs} runs", statistics.median(commands), _WANTED_S, at_least=False)
    return report


def _make_runs(folder: Path, num_runs: int, num_rows: int) -> dict[str, str]:
    """Name -> the state that the table should show."""
    (folder / "metrics").write_text("".join(json.dumps(_row(number)) + "\n" for number in range(1, num_rows + 1)))
    states = {}
    for number in range(num_runs):
        home = folder / f"run-{number:04d}"
        home.mkdir()
        states[home.name] = ("finished", "failed", "unknown")[number % 3]
        shutil.copy(folder / "metrics", home / METRICS_FILE)
        _start(home, states[home.name], num_rows)
    (folder / "metrics").unlink()
    return states


def _start(home: Path, state: str, num_rows: int) -> None:
    jobs, run_starts = JsonLines(home / JOBS_FILE), JsonLines(home / STARTS_FILE)
    for restart in range(_NUM_STARTS):
        began_unix_s = time.time() - 86400 * (_NUM_STARTS - restart)
        job_id = str(1000 + restart)
        jobs.append(asdict(Submission(job_id, began_unix_s, "local", 1)))
        attempt = attempt_folder(home, job_id, 0)
        keep(attempt / "start.json", Start(job_id, 0, ["elsewhere"], 8, began_unix_s, restart))
        number = starts.Start.claim(home).number
        claim = claim_path(home, number)
        claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "elsewhere", "time": _iso(began_unix_s)}))
        run_starts.append(
            {"incarnation": number, "started_unix_s": began_unix_s, "start_samples": 0, "num_ranks": 8,
             "total_samples": num_rows * _BATCH, "host": "elsewhere", "versions": {"torch": "2.13.0"}}
        )  # fmt: skip
        if restart < _NUM_STARTS - 1:
            keep(attempt / "verdict.json", Verdict("requeue", "stopped on request (SIGUSR2)", 75, began_unix_s + 1))
        elif state == "failed":
            keep(attempt / "verdict.json", Verdict("fail", "rank 0: no disk", 1, time.time()))
        elif state == "finished":
            write_outcome(home, number, 0, "finished", samples=num_rows * _BATCH)
    jobs.close()
    run_starts.close()


def _iso(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(unix_s))


def _row(number: int) -> dict[str, float]:
    """As long as a real one: every metric that training logs, and where its time went."""
    metrics = {name: 1.0 / number for name in METRICS if not name.startswith("encode/")}
    shares = {goodput_share(kind): 1.0 / len(WALL_TIME) for kind in WALL_TIME}
    written_unix_s = time.time() - 86400 + number
    place = {"samples": number * _BATCH, "time_unix_s": written_unix_s, "incarnation": _NUM_STARTS}
    return {**place, **metrics, **shares}


def _seconds(command: list[str]) -> float:
    begin_s = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begin_s


def _check(printed: str, states: dict[str, str], num_rows: int) -> None:
    """No figure is given for a table that is wrong."""
    shown = {run["name"]: run for run in json.loads(printed)}
    wrong = [
        name
        for name, state in states.items()
        if name not in shown
        or shown[name]["state"] != state
        or shown[name]["samples"] != num_rows * _BATCH
        or shown[name]["num_starts"] != _NUM_STARTS
    ]
    if wrong:
        raise RuntimeError(f"the table is wrong of {', '.join(wrong[:5])}")
