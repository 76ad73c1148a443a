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
from running import ENVIRONMENT, GLOBAL_BATCH, checkpoint_samples, outcome

from launch.job import attempts, submissions

SHORT = [f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}", "faults.preflight=false"]


def test_a_local_run_outlives_the_command_and_its_terminal(tiny_recipe: Path) -> None:
    home = tiny_recipe.parent / "runs" / "tiny"
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "local", *SHORT]
    # In a session of its own, as a terminal's is; a pipe that its processes kept open would never end.
    done = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, start_new_session=True, check=True
    )
    (submission,) = submissions(home)
    assert submission.scheduler == "local"
    assert f"job       {submission.job_id}, submitted" in done.stdout
    controller = psutil.Process(int(submission.job_id))
    try:
        assert os.getsid(controller.pid) not in (os.getsid(0), done.returncode)
        assert controller.terminal() is None
        for descriptor in (0, 1, 2):
            assert "pipe:" not in os.readlink(f"/proc/{controller.pid}/fd/{descriptor}")
        controller.wait(120)
    finally:
        with suppress(psutil.NoSuchProcess):
            controller.send_signal(signal.SIGTERM)
    assert outcome(home)["state"] == "finished"
    assert checkpoint_samples(home) == 10 * GLOBAL_BATCH
    (attempt,) = attempts(home)
    assert attempt.verdict is not None
    assert (attempt.verdict.action, attempt.verdict.exit_code) == ("done", 0)


def interrupt_while_submitting(recipe: Path, home: Path, *overrides: str) -> str:
    """Ctrl-C just when a job is being started. Returns what people were told."""
    words = [sys.executable, "-m", "pomscale", "launch", str(recipe), "--cluster", "local", *overrides]
    launching = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline_s = time.monotonic() + 60
    while not (home / "submitit").is_dir():  # now it is just being submitted
        assert launching.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    os.killpg(launching.pid, signal.SIGINT)
    told = launching.communicate(timeout=60)[1]
    assert launching.returncode == 130
    return told


def wait_for_end(home: Path) -> None:
    (submission,) = submissions(home)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(submission.job_id)).wait(60)


def test_ctrl_c_while_a_job_is_submitted_leaves_none_that_nobody_knows_of(tiny_recipe: Path) -> None:
    home = tiny_recipe.parent / "runs" / "tiny"
    told = interrupt_while_submitting(tiny_recipe, home, "training.total_samples=320000")
    assert f"`pomscale runs cancel {home}` ends it" in told
    (submission,) = submissions(home)
    of_process = Path(f"/proc/{submission.job_id}/status").read_text()
    blocked = int(of_process.partition("SigBlk:")[2].split()[0], 16)
    assert not blocked & 1 << signal.SIGINT - 1
    cancelling = [sys.executable, "-m", "pomscale", "runs", "cancel", str(home)]
    subprocess.run(cancelling, env=ENVIRONMENT, timeout=60, check=True)
    wait_for_end(home)


def test_ctrl_c_while_a_pipeline_is_submitted_leaves_none_of_its_jobs(tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent
    pipeline = folder / "pipeline.yaml"
    stages = [
        f"  - {{name: train, recipe: {tiny_recipe.name}, overrides: [training.total_samples=320000]}}",
        "  - {name: look, run: ['report {train}']}",
    ]
    pipeline.write_text("\n".join(["kind: pipeline", "name: all", f"output: {folder}/pipelines", "stages:", *stages]))
    home = folder / "runs" / "tiny"
    told = interrupt_while_submitting(pipeline, home)
    assert "nothing is left in the queue: train had been submitted" in told
    wait_for_end(home)
    assert not (folder / "pipelines" / "all" / "look").exists()


@pytest.mark.parametrize(("overrides", "expect"), [([], 0), (["optimizer.lr=1e30", "faults.max_rollbacks=0"], 1)])
def test_a_debug_run_ends_with_its_own_exit_code(tiny_recipe: Path, overrides: list[str], expect: int) -> None:
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "debug", *SHORT, *overrides]
    done = subprocess.run(
        words, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    home = tiny_recipe.parent / "runs" / "tiny"
    (submission,) = submissions(home)
    (attempt,) = attempts(home)
    assert submission.scheduler == "debug"
    assert attempt.start.job_id == submission.job_id
    assert attempt.verdict is not None
    assert attempt.verdict.exit_code == expect


def test_the_runs_of_a_sweep_take_turns_on_one_machine(tiny_recipe: Path) -> None:
    with tiny_recipe.open("a") as file:
        file.write("sweep: {seed: [0, 1]}\n")
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", "local", *SHORT]
    subprocess.run(words, env=ENVIRONMENT, capture_output=True, timeout=60, check=True)
    first, second = (tiny_recipe.parent / "runs" / f"tiny.seed={seed}" for seed in (0, 1))
    pids = [int(submissions(home)[-1].job_id) for home in (first, second)]
    try:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(120)
    finally:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(signal.SIGTERM)
    (before,), (after,) = attempts(first), attempts(second)
    assert before.verdict is not None
    assert after.verdict is not None
    assert after.start.started_unix_s >= before.verdict.decided_unix_s
    assert (outcome(first)["state"], outcome(second)["state"]) == ("finished", "finished")
