"""Cancel, requeue and resume of runs without SLURM: a job of `pomscale launch --cluster local`, and one by hand."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import GLOBAL_BATCH, UNHURRIED, pomscale, rows, started, train_command, write_tiny_recipe

from launch.job import attempts
from launch.run_control import cancel, requeue, resume
from launch.run_logs import show_logs
from launch.runs import RunSummary, summarize
from pomscale.distributed.generation import Generation
from pomscale.errors import InputError, PomscaleError

OVERRIDES = ["schedule={}", f"training.total_samples={100_000 * GLOBAL_BATCH}"]  # never done by itself


def summary(home: Path) -> RunSummary:
    return summarize({home: "tiny"}).runs[0]


def wait_for(home: Path, *states: str, num_starts: int = 0, timeout_s: float = 90.0) -> RunSummary:
    deadline_s = time.monotonic() + timeout_s
    while (run := summary(home)).state not in states or run.num_starts < num_starts:
        assert time.monotonic() < deadline_s, run
        time.sleep(0.1)
    return run


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path, digits)


@pytest.fixture
def home(recipe: Path) -> Iterator[Path]:
    """Of a local job that runs; nothing of it is left behind."""
    home = recipe.parent / "runs" / "tiny"
    pomscale("launch", recipe, "--cluster", "local", *OVERRIDES, env=UNHURRIED)
    try:
        wait_for(home, "running")
        yield home
    finally:
        cancel(home)


@pytest.mark.slow
def test_a_local_job_is_requeued_cancelled_and_resumed(home: Path) -> None:
    with pytest.raises(InputError, match="running already"):
        resume(home)
    with pytest.raises(InputError, match="--now is for jobs of SLURM"):
        requeue(home, now=True)
    assert "asked to save and start again" in requeue(home)
    wait_for(home, "running", num_starts=2)
    done = cancel(home)
    assert done.done
    assert "ended; saved: " in done.text
    assert (summary(home).state, summary(home).reason) == ("stopped", "stopped on request (SIGTERM), saved")
    again = cancel(home)
    assert not again.done
    assert "not in the queue: stopped" in again.text
    with pytest.raises(InputError, match="only a job that runs can be requeued"):
        requeue(home)
    with pytest.raises(InputError, match="a local job has one node"):
        resume(home, num_nodes=2)
    with pytest.raises(InputError, match="--time soon"):
        resume(home, time_limit="soon")
    job_id = resume(home)
    wait_for(home, "running", num_starts=3)
    assert [attempt.start.restart for attempt in attempts(home)] == [0, 1, 0]
    assert attempts(home)[-1].start.job_id == job_id
    ends: dict[int, int] = {}
    for row in rows(home):
        ends[row["incarnation"]] = row["samples"]
    starts = [json.loads(line)["start_samples"] for line in (home / "incarnations.jsonl").read_text().splitlines()]
    assert starts == [0, ends[1], ends[2]]
    lines: list[str] = []
    first = attempts(home)[0].folder.name
    show_logs(home, rank=0, lines=None, attempt=first, follow=False, show=lines.append)
    assert lines[0].startswith(f"===== start {first} on ")
    assert lines[-1].startswith(f"stopped on request at {ends[1]:,} samples")


def test_a_run_by_hand_saves_and_ends(recipe: Path) -> None:
    home = recipe.parent / "runs" / "tiny"
    with started(train_command(recipe, *OVERRIDES), stderr=subprocess.STDOUT) as process:
        wait_for(home, "running")
        with pytest.raises(InputError, match="nothing would start it again"):
            requeue(home)
        done = cancel(home)
        process.communicate(timeout=30)
    assert done.done
    assert process.returncode == 75
    assert (summary(home).state, json.loads((home / "outcome.json").read_text())["state"]) == ("stopped", "stopped")
    with pytest.raises(InputError, match="type the command again that has started it"):
        resume(home)


def test_a_run_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    claim = tmp_path / "generations" / f"{Generation.claim(tmp_path).number:06d}"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "elsewhere", "slurm_job_id": None}))
    with pytest.raises(PomscaleError, match=r"runs on elsewhere, process \d+, outside of any job: end it there"):
        cancel(tmp_path)
