"""Cancel, requeue and resume of runs without SLURM: a job of `pomscale launch --cluster local`, and one by hand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.record.job import attempts
from launch.status.facts import read_facts
from launch.status.logs import show_logs
from launch.status.runs import RunSummary, summarize
from launch.submission.control import cancel, requeue, resume
from pomscale.base.errors import InputError, PomscaleError
from pomscale.runs.starts import Start
from support.running import (
    GLOBAL_BATCH,
    UNHURRIED,
    pomscale,
    rows,
    started,
    train_command,
    wait_until,
    write_tiny_recipe,
)

OVERRIDES = ["schedule={}", f"training.total_samples={100_000 * GLOBAL_BATCH}"]  # never done by itself


def summary(home: Path) -> RunSummary:
    return summarize({home: "tiny"}).runs[0]


def wait_until_it_trains(home: Path, start: int = 1) -> None:
    """Until that start of it has logged a step: a run that runs but has done none has nothing to save."""
    wait_until(
        lambda: any("train/loss" in row and row["incarnation"] >= start for row in read_facts(home).rows),
        lambda: summary(home),
        every_s=0.1,
    )


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path, digits)


@pytest.fixture
def home(recipe: Path) -> Iterator[Path]:
    """Of a local job that runs; nothing of it is left behind."""
    home = recipe.parent / "runs" / "tiny"
    pomscale("launch", recipe, "--cluster", "local", *OVERRIDES, env=UNHURRIED)
    try:
        wait_until_it_trains(home)
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
    wait_until_it_trains(home, start=2)
    done = cancel(home, wait_s=120)
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
    wait_until_it_trains(home, start=3)
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
        wait_until_it_trains(home)
        with pytest.raises(InputError, match="nothing would start it again"):
            requeue(home)
        done = cancel(home, wait_s=120)
        process.communicate(timeout=120)
    assert done.done
    assert process.returncode == 75
    assert (summary(home).state, json.loads((home / "outcome.json").read_text())["state"]) == ("stopped", "stopped")
    with pytest.raises(InputError, match="type the command again that has started it"):
        resume(home)


def test_a_run_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    claim = tmp_path / "generations" / f"{Start.claim(tmp_path).number:06d}"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "elsewhere", "slurm_job_id": None}))
    with pytest.raises(PomscaleError, match=r"runs on elsewhere, process \d+, outside of any job: end it there"):
        cancel(tmp_path)
