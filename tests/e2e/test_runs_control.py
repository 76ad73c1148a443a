"""Cancel, requeue and resume of runs without SLURM: a job of `pomscale launch --cluster local`, and one by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.record.job import JobSpec, read_starts
from launch.status.facts import read_facts
from launch.status.logs import show_logs
from launch.status.runs import RunSummary, summarize
from launch.submission.control import cancel, requeue, resume
from pomscale.base.errors import InputError, PomscaleError
from pomscale.runs.starts import Start, newest_start
from support.forking import standing_in
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


def summary(job_folder: Path) -> RunSummary:
    return summarize({job_folder: "tiny"}).runs[0]


def wait_until_it_trains(job_folder: Path, start: int = 1) -> None:
    """Until that start of it has logged a step: a run that runs but has done none has nothing to save."""
    wait_until(
        lambda: any("train/loss" in row and row["incarnation"] >= start for row in read_facts(job_folder).rows),
        lambda: summary(job_folder),
        every_s=0.1,
    )


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path, digits)


@pytest.fixture
def job_folder(recipe: Path) -> Iterator[Path]:
    """Of a local job that runs; nothing of it is left behind."""
    job_folder = recipe.parent / "runs" / "tiny"
    pomscale("launch", recipe, "--cluster", "local", *OVERRIDES, env=UNHURRIED | standing_in())
    try:
        wait_until_it_trains(job_folder)
        yield job_folder
    finally:
        if job_folder.exists():
            cancel(job_folder)


@pytest.mark.slow
def test_a_local_job_is_requeued_cancelled_and_resumed(job_folder: Path) -> None:
    with pytest.raises(InputError, match="running already"):
        resume(job_folder)
    with pytest.raises(InputError, match="--now is for jobs of SLURM"):
        requeue(job_folder, now=True)
    assert "asked to save and start again" in requeue(job_folder)
    wait_until_it_trains(job_folder, start=2)
    done = cancel(job_folder, wait_s=120)
    assert done.done
    assert "ended; saved: " in done.text
    assert (summary(job_folder).state, summary(job_folder).reason) == ("stopped", "stopped on request (SIGTERM), saved")
    again = cancel(job_folder)
    assert not again.done
    assert "not in the queue: stopped" in again.text
    with pytest.raises(InputError, match="only a running job can be requeued"):
        requeue(job_folder)
    with pytest.raises(InputError, match="a local job has one node"):
        resume(job_folder, num_nodes=2)
    with pytest.raises(InputError, match="--time soon"):
        resume(job_folder, time_limit="soon")
    job_id = resume(job_folder)
    wait_until_it_trains(job_folder, start=3)
    assert [start.record.restart for start in read_starts(job_folder)] == [0, 1, 0]
    assert read_starts(job_folder)[-1].record.job_id == job_id
    ends: dict[int, int] = {}
    for row in rows(job_folder):
        ends[row["incarnation"]] = row["samples"]
    starts = [
        json.loads(line)["start_samples"] for line in (job_folder / "incarnations.jsonl").read_text().splitlines()
    ]
    assert starts == [0, ends[1], ends[2]]
    lines: list[str] = []
    first = read_starts(job_folder)[0].folder.name
    show_logs(job_folder, rank=0, lines=None, start=first, follow=False, show=lines.append)
    assert lines[0].startswith(f"===== start {first} on ")
    assert lines[-1].startswith(f"stopped on request at {ends[1]:,} samples")


def test_a_run_by_hand_saves_and_ends(recipe: Path) -> None:
    job_folder = recipe.parent / "runs" / "tiny"
    with started(train_command(recipe, *OVERRIDES), stderr=subprocess.STDOUT) as process:
        wait_until_it_trains(job_folder)
        with pytest.raises(InputError, match="nothing would start it again"):
            requeue(job_folder)
        done = cancel(job_folder, wait_s=120)
        process.communicate(timeout=120)
    assert done.done
    assert process.returncode == 75
    assert (summary(job_folder).state, json.loads((job_folder / "outcome.json").read_text())["state"]) == (
        "stopped",
        "stopped",
    )
    with pytest.raises(InputError, match="type the command again that has started it"):
        resume(job_folder)


def test_a_run_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    claim = tmp_path / "generations" / f"{Start.claim(tmp_path).number:06d}"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "elsewhere", "slurm_job_id": None}))
    with pytest.raises(PomscaleError, match=r"runs on elsewhere, process \d+, outside of any job: end it there"):
        cancel(tmp_path)


@pytest.mark.slow
def test_a_run_folder_that_is_copied_or_moved_is_a_run_where_it_lies(job_folder: Path) -> None:
    copy = job_folder.with_name("copy")
    shutil.copytree(job_folder, copy, ignore=shutil.ignore_patterns("samples-*"))  # which may be deleted meanwhile
    done = cancel(copy)
    assert not done.done
    assert f"a copy of {job_folder}" in done.text
    with pytest.raises(InputError, match="only a running job can be requeued"):
        requeue(copy)
    resume(copy)
    try:
        wait_until_it_trains(copy, start=2)
        assert newest_start(job_folder) == 1
        assert summary(job_folder).state == "running"
    finally:
        assert cancel(copy, wait_s=120).done
    assert JobSpec.read(copy / "job.json").name == "copy"
    cancel(job_folder, wait_s=120)

    moved = job_folder.rename(job_folder.with_name("moved"))
    resume(moved)
    try:
        wait_until_it_trains(moved, start=2)
        assert not job_folder.exists()
    finally:
        assert cancel(moved, wait_s=120).done
