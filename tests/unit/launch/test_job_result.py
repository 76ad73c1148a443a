"""How the newest submission of a job ended, by its folder: what waits for it goes by that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.record.job import Condition, Submission, Verdict, keep, start_folder
from launch.record.result import final_verdict, is_success, why_not_to_begin
from pomscale.base.jsonl import JsonLines
from pomscale.runs.layout import JOBS_FILE

HERE = str(os.getpid())  # a process that lives


def submitted(job_folder: Path, job_id: str, scheduler: str = "slurm", num_tasks: int = 1) -> None:
    job_folder.mkdir(exist_ok=True)
    lines = JsonLines(job_folder / JOBS_FILE)
    submission = Submission(job_id, time.time(), scheduler, 1, num_tasks)  # type: ignore[arg-type]
    lines.append(vars(submission))
    lines.close()


def judged(
    job_folder: Path, job_id: str, restart: int, action: str, exit_code: int = 0, reason: str = "because"
) -> None:
    verdict = Verdict(action, reason, exit_code, time.time())  # type: ignore[arg-type]
    keep(start_folder(job_folder, job_id, restart) / "verdict.json", verdict)


def test_nothing_is_known_before_a_verdict(tmp_path: Path) -> None:
    assert final_verdict(tmp_path / "none") is None
    submitted(tmp_path, "12")
    assert final_verdict(tmp_path) is None


@pytest.mark.parametrize(
    ("action", "exit_code", "success"), [("done", 0, True), ("done", 3, False), ("fail", 1, False)]
)
def test_a_verdict_tells(tmp_path: Path, action: str, exit_code: int, success: bool) -> None:
    submitted(tmp_path, "12")
    judged(tmp_path, "12", 0, action, exit_code)
    verdict = final_verdict(tmp_path)
    assert verdict is not None
    assert is_success(verdict) == success


@pytest.mark.parametrize(
    ("action", "condition", "expected"),
    [
        ("done", "ok", ""),
        ("fail", "ok", "did not succeed: because"),
        ("requeue", "ok", "has left no record of its success"),
        (None, "ok", "has left no record of its success"),
        ("fail", "any", ""),
    ],
)
def test_a_job_that_slurm_starts_goes_by_the_verdict_on_the_job_before_it(
    tmp_path: Path, action: str | None, condition: Condition, expected: str
) -> None:
    submitted(tmp_path, "12")
    if action is not None:
        judged(tmp_path, "12", 0, action)
    reason = why_not_to_begin({str(tmp_path): condition}, patience_s=0.0)
    assert reason == (f"not begun, since the job before it ({tmp_path}) {expected}" if expected else "")


@pytest.mark.parametrize("action", ["requeue", "leave"])
def test_a_job_that_is_started_again_goes_on(tmp_path: Path, action: str) -> None:
    submitted(tmp_path, "12")
    judged(tmp_path, "12", 0, action, 75)
    assert final_verdict(tmp_path) is None
    judged(tmp_path, "12", 1, "done")
    assert final_verdict(tmp_path) is not None


def test_an_old_failure_says_nothing_about_a_new_submission(tmp_path: Path) -> None:
    submitted(tmp_path, "12")
    judged(tmp_path, "12", 0, "fail", 1)
    submitted(tmp_path, "120")
    assert final_verdict(tmp_path) is None
    judged(tmp_path, "120", 0, "done")
    verdict = final_verdict(tmp_path)
    assert verdict is not None
    assert is_success(verdict)


def test_an_array_has_ended_when_all_its_tasks_have(tmp_path: Path) -> None:
    submitted(tmp_path, "7", num_tasks=3)
    for task in (0, 2):
        judged(tmp_path, f"7_{task}", 0, "done")
    judged(tmp_path, "7_1", 0, "requeue", 75)
    assert final_verdict(tmp_path) is None
    judged(tmp_path, "7_1", 1, "fail", 1, "no room")
    verdict = final_verdict(tmp_path)
    assert verdict is not None
    assert (verdict.action, verdict.reason) == ("fail", "no room")


def test_a_local_job_whose_process_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    submitted(tmp_path, str(process.pid), "local")
    verdict = final_verdict(tmp_path)
    assert verdict is not None
    assert "gone" in verdict.reason
    judged(tmp_path, str(process.pid), 0, "requeue", 75, "SIGTERM, saved")
    verdict = final_verdict(tmp_path)
    assert verdict is not None
    assert (verdict.action, verdict.reason) == ("fail", "SIGTERM, saved")


def test_numbers_of_processes_repeat(tmp_path: Path) -> None:
    """A verdict of another life of this home, when its process had the same number."""
    judged(tmp_path, HERE, 0, "fail", 1)
    time.sleep(0.01)
    submitted(tmp_path, HERE, "local")
    assert final_verdict(tmp_path) is None
    judged(tmp_path, HERE, 0, "done")
    assert final_verdict(tmp_path) is not None
