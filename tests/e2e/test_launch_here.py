"""`pomscale launch` without SLURM: in the background of this machine, or in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.record.job import read_starts, read_submissions
from support.running import (
    GLOBAL_BATCH,
    TIMEOUT_S,
    checkpoint_samples,
    controller_of,
    held_at,
    open_process,
    outcome,
    pomscale,
    run,
)

SHORT = [f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}", "faults.preflight=false"]


def test_a_local_run_outlives_the_command_and_its_terminal(tiny_recipe: Path) -> None:
    job_folder = tiny_recipe.parent / "runs" / "tiny"
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "local", *SHORT]
    # In a session of its own, as a terminal's is; a pipe that its processes kept open would never end.
    # It does not end before it was looked at.
    held = tiny_recipe.parent / "held"
    environment = held_at(held, 5 * GLOBAL_BATCH)
    done = run(words, env=environment, start_new_session=True)
    (submission,) = read_submissions(job_folder)
    assert submission.scheduler == "local"
    assert f"job       {submission.job_id}, submitted" in done.stdout
    controller = psutil.Process(int(submission.job_id))
    try:
        assert os.getsid(controller.pid) not in (os.getsid(0), done.returncode)
        assert controller.terminal() is None
        for descriptor in (0, 1, 2):
            assert "pipe:" not in os.readlink(f"/proc/{controller.pid}/fd/{descriptor}")
        held.unlink()
        controller.wait(TIMEOUT_S)
    finally:
        with suppress(psutil.NoSuchProcess):
            controller.send_signal(signal.SIGTERM)
    assert outcome(job_folder)["state"] == "finished"
    assert checkpoint_samples(job_folder) == 10 * GLOBAL_BATCH
    (start,) = read_starts(job_folder)
    assert start.verdict is not None
    assert (start.verdict.action, start.verdict.exit_code) == ("done", 0)


def interrupt_while_submitting(recipe: Path, job_folder: Path, *overrides: str) -> str:
    """Ctrl-C just when a job is being started, which is not over before. Returns what people were told."""
    held = recipe.parent / "held"
    words = [sys.executable, "-m", "pomscale", "launch", str(recipe), "--cluster", "local", *overrides]
    environment = held_at(held, 0)
    launching = open_process(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (job_folder / "submitit").is_dir():  # now it is just being submitted
        assert launching.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    os.killpg(launching.pid, signal.SIGINT)
    held.unlink()
    told = launching.communicate(timeout=TIMEOUT_S)[1]
    assert launching.returncode == 130
    return told


def wait_for_end(job_folder: Path) -> None:
    (_,) = read_submissions(job_folder)
    if (controller := controller_of(job_folder)) is not None:
        controller.wait(TIMEOUT_S)


def test_ctrl_c_while_a_job_is_submitted_leaves_none_that_nobody_knows_of(tiny_recipe: Path) -> None:
    job_folder = tiny_recipe.parent / "runs" / "tiny"
    told = interrupt_while_submitting(tiny_recipe, job_folder, "training.total_samples=320000")
    assert f"`pomscale runs cancel {job_folder}` ends it" in told
    (submission,) = read_submissions(job_folder)
    of_process = Path(f"/proc/{submission.job_id}/status").read_text()
    blocked = int(of_process.partition("SigBlk:")[2].split()[0], 16)
    assert not blocked & 1 << signal.SIGINT - 1
    pomscale("runs", "cancel", job_folder)
    wait_for_end(job_folder)


def test_ctrl_c_while_a_pipeline_is_submitted_leaves_none_of_its_jobs(tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent
    pipeline = folder / "pipeline.yaml"
    stages = [
        f"  - {{name: train, recipe: {tiny_recipe.name}, overrides: [training.total_samples=320000]}}",
        "  - {name: look, run: ['report {train}']}",
    ]
    pipeline.write_text("\n".join(["kind: pipeline", "name: all", f"output: {folder}/pipelines", "stages:", *stages]))
    job_folder = folder / "runs" / "tiny"
    told = interrupt_while_submitting(pipeline, job_folder)
    assert "nothing is left in the queue: train had been submitted" in told
    wait_for_end(job_folder)
    assert not (folder / "pipelines" / "all" / "look").exists()


@pytest.mark.parametrize(("overrides", "expect"), [([], 0), (["optimizer.lr=1e30", "faults.max_rollbacks=0"], 1)])
def test_a_debug_run_ends_with_its_own_exit_code(tiny_recipe: Path, overrides: list[str], expect: int) -> None:
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "debug", *SHORT, *overrides]
    run(words, expect, stdin=subprocess.DEVNULL)
    job_folder = tiny_recipe.parent / "runs" / "tiny"
    (submission,) = read_submissions(job_folder)
    (start,) = read_starts(job_folder)
    assert submission.scheduler == "debug"
    assert start.record.job_id == submission.job_id
    assert start.verdict is not None
    assert start.verdict.exit_code == expect


def test_the_runs_of_a_sweep_take_turns_on_one_machine(tiny_recipe: Path) -> None:
    with tiny_recipe.open("a") as file:
        file.write("sweep: {seed: [0, 1]}\n")
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "local", *SHORT]
    run(words)
    first, second = (tiny_recipe.parent / "runs" / f"tiny.seed={seed}" for seed in (0, 1))
    controllers = [process for process in map(controller_of, (first, second)) if process is not None]
    try:
        for controller in controllers:
            controller.wait(TIMEOUT_S)
    finally:
        for controller in controllers:
            with suppress(psutil.NoSuchProcess):
                controller.send_signal(signal.SIGTERM)
    (before,), (after,) = read_starts(first), read_starts(second)
    assert before.verdict is not None
    assert after.verdict is not None
    assert after.record.started_unix_s >= before.verdict.decided_unix_s
    assert (outcome(first)["state"], outcome(second)["state"]) == ("finished", "finished")
