"""`pomscale bench runs`: duration of the table of many runs, from the command to its last line.

The folders are written by the code that writes those of real runs, with several starts each; some have finished, some
have failed, some seem to run elsewhere. Their metrics have the length asked for, on which the table must not depend.
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

from launch.record.job import StartRecord, Submission, Verdict, keep, start_folder
from launch.status.runs import find_runs, summarize
from pomscale.base.jsonl import JsonLines
from pomscale.benchmarks.report import BenchReport
from pomscale.runs import starts
from pomscale.runs.layout import JOBS_FILE, METRICS_FILE, STARTS_FILE, claim_path
from pomscale.runs.metric_names import METRICS, WALL_TIME, goodput_share
from pomscale.runs.outcome import write_outcome

_WANTED_S = 1.0
_NUM_STARTS, _NUM_TURNS = 4, 5
_BATCH = 256


def bench_runs(*, num_runs: int, num_rows: int) -> BenchReport:
    """Measure the table of `num_runs` runs with `num_rows` rows of metrics each."""
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
    report.compare(f"seconds for {num_runs} runs", statistics.median(commands), _WANTED_S, at_least=False)
    return report


def _make_runs(folder: Path, num_runs: int, num_rows: int) -> dict[str, str]:
    """Make the run folders. Returns name -> the state that the table should show."""
    (folder / "metrics").write_text("".join(json.dumps(_row(number)) + "\n" for number in range(1, num_rows + 1)))
    states = {}
    for number in range(num_runs):
        run = folder / f"run-{number:04d}"
        run.mkdir()
        states[run.name] = ("finished", "failed", "unknown")[number % 3]
        shutil.copy(folder / "metrics", run / METRICS_FILE)
        _record_starts(run, states[run.name], num_rows)
    (folder / "metrics").unlink()
    return states


def _record_starts(run: Path, state: str, num_rows: int) -> None:
    jobs, run_starts = JsonLines(run / JOBS_FILE), JsonLines(run / STARTS_FILE)
    for restart in range(_NUM_STARTS):
        began_unix_s = time.time() - 86400 * (_NUM_STARTS - restart)
        job_id = str(1000 + restart)
        jobs.append(asdict(Submission(job_id, began_unix_s, "local", 1)))
        folder = start_folder(run, job_id, 0)
        keep(folder / "start.json", StartRecord(job_id, 0, ["elsewhere"], 8, began_unix_s, restart))
        number = starts.Start.claim(run).number
        claim = claim_path(run, number)
        claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "elsewhere", "time": _iso(began_unix_s)}))
        run_starts.append(
            {"incarnation": number, "started_unix_s": began_unix_s, "start_samples": 0, "num_ranks": 8,
             "total_samples": num_rows * _BATCH, "host": "elsewhere", "versions": {"torch": "2.13.0"}}
        )  # fmt: skip
        if restart < _NUM_STARTS - 1:
            keep(folder / "verdict.json", Verdict("requeue", "stopped on request (SIGUSR2)", 75, began_unix_s + 1))
        elif state == "failed":
            keep(folder / "verdict.json", Verdict("fail", "rank 0: no disk", 1, time.time()))
        elif state == "finished":
            write_outcome(run, number, 0, "finished", samples=num_rows * _BATCH)
    jobs.close()
    run_starts.close()


def _iso(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(unix_s))


def _row(number: int) -> dict[str, float]:
    """Make a row as long as a real one: every metric that training logs, and shares of its time."""
    metrics = {name: 1.0 / number for name in METRICS if not name.startswith("encode/")}
    shares = {goodput_share(kind): 1.0 / len(WALL_TIME) for kind in WALL_TIME}
    written_unix_s = time.time() - 86400 + number
    position = {"samples": number * _BATCH, "time_unix_s": written_unix_s, "incarnation": _NUM_STARTS}
    return {**position, **metrics, **shares}


def _seconds(command: list[str]) -> float:
    begin_s = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begin_s


def _check(printed: str, states: dict[str, str], num_rows: int) -> None:
    """Check the table; a wrong one gets no figure."""
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
        raise RuntimeError(f"the table is wrong for {', '.join(wrong[:5])}")
