"""`pomscale evaluate images RUN --every N`: which checkpoints get a job, also of a run that has ended. No scheduler."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.node.evaluations import evaluation_folder
from launch.pipelines import checkpoints
from launch.pipelines.checkpoints import CheckpointEvaluation
from launch.record.job import JobSpec, Submission, keep, read_submissions
from launch.submission import prepared
from launch.submission.job_script import SubmitOptions
from launch.submission.prepare import JobRequest
from launch.submission.submit import record_submission
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.load import dump_recipe, load_cluster, load_train_recipe
from pomscale.runs.checkpoint_folder import remove
from pomscale.runs.layout import EVALUATED_FOLDER, FAILED_FILE, JOB_FILE
from support.paths import RECIPES

COMMAND = "evaluate images {checkpoint} --num 50 --json {folder}/figures.json"


def save(run: Path, samples: int) -> Path:
    folder = run / "checkpoints" / f"samples-{samples:012d}"
    folder.mkdir(parents=True)
    for name in ("checkpoint.json", "COMPLETE"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(load_train_recipe(RECIPES / "quickstart.yaml")))
    for samples in (60, 120, 180, 240, 450, 480):
        save(folder, samples)
    return folder


class Scheduler:
    """Stands for the scheduler behind launch.submission.submit: jobs of this very process, so that they are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.specs: list[JobSpec] = []
        self.problem: PomscaleError | None = None
        monkeypatch.setattr(prepared, "submit", self.submit)
        monkeypatch.setattr(prepared, "freeze", lambda *_, **__: None)

    @property
    def asked(self) -> list[int]:
        return [int(Path(spec.job_folder).name.removeprefix("samples-")) for spec in self.specs]

    def submit(self, spec: JobSpec, profile: ClusterProfile, options: SubmitOptions) -> str:
        if self.problem is not None:
            raise self.problem
        assert (Path(spec.job_folder) / EVALUATED_FOLDER / "COMPLETE").is_file(), "all of it is there"
        self.specs.append(spec)
        keep(Path(spec.job_folder) / JOB_FILE, spec)
        record_submission(Path(spec.job_folder), Submission(str(os.getpid()), time.time(), "local", 1))
        return str(os.getpid())


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    return Scheduler(monkeypatch)


def every(run: Path, samples: int = 100, *, command: str = COMMAND, **options: Any) -> CheckpointEvaluation:
    """options: dry_run of the request, and check."""
    config = EvaluationConfig(name="images", every_samples=samples, run=[command])
    request = JobRequest(load_cluster("local"), "local", dry_run=options.pop("dry_run", False))
    return CheckpointEvaluation(run, config, request, **options)


def test_every_kept_checkpoint_that_is_due_of_a_run_that_has_ended(run: Path, scheduler: Scheduler) -> None:
    assert every(run).follow() == 4
    assert scheduler.asked == [120, 240, 450, 480], "the first after each multiple, and the last one"
    folder = evaluation_folder(run, "images", 240)
    commands = scheduler.specs[1].commands
    assert commands[0] == [
        *["evaluate", "images", f"{folder}/checkpoint"],
        *["--num", "50", "--json", f"{folder}/figures.json"],
    ]
    assert commands[1][:5] == ["evaluate", "record", str(run), "images", "240"]
    assert scheduler.specs[1].wait_for == {scheduler.specs[0].job_folder: "any"}, "one machine does one after another"


def test_nothing_is_submitted_twice(run: Path, scheduler: Scheduler) -> None:
    every(run).follow()
    assert every(run).follow() == 0
    save(run, 600)
    assert every(run).follow() == 1
    assert scheduler.asked == [120, 240, 450, 480, 600]


def test_what_the_jobs_would_end_with_is_found_before_any_is_submitted(run: Path, scheduler: Scheduler) -> None:
    def refuse() -> None:
        raise InputError("no such reference")

    for dry_run in (True, False):
        with pytest.raises(InputError, match="no such reference"):
            every(run, check=refuse, dry_run=dry_run).follow()
    assert scheduler.asked == []
    assert not (run / "evaluations").exists()


def test_a_run_is_checked_again_once_there_is_a_checkpoint(
    run: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "checkpoints")
    states = iter(["running", "running", "finished"])
    monkeypatch.setattr(checkpoints, "summarize", lambda _: SimpleNamespace(runs=[SimpleNamespace(state=next(states))]))
    come = iter([[120], [240]])
    monkeypatch.setattr(checkpoints.time, "sleep", lambda _: [save(run, samples) for samples in next(come)])
    checked: list[int] = []
    assert every(run, check=lambda: checked.append(len(list(run.glob("checkpoints/*"))))).follow() == 2
    assert checked == [0, 1]


def test_a_dry_run_submits_and_leaves_nothing(
    run: Path, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert every(run, dry_run=True).follow() == 4
    assert scheduler.asked == []
    assert not (run / "evaluations").exists()
    assert "samples-000000000450: would be submitted: pomscale evaluate images" in capsys.readouterr().out


def test_checkpoints_of_a_run_that_goes_on_as_they_come(
    run: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter(["running", "running", "running", "finished"])
    come: Iterator[list[int]] = iter([[700, 720], [], [830]])
    summary = SimpleNamespace
    monkeypatch.setattr(checkpoints, "summarize", lambda _: summary(runs=[summary(state=next(states))]))
    answers = iter([PomscaleError("no answer"), None, None])

    def pass_time(_: float) -> None:
        scheduler.problem = next(answers)
        for samples in next(come):
            save(run, samples)

    monkeypatch.setattr(checkpoints.time, "sleep", pass_time)
    assert every(run).follow() == 5
    assert scheduler.asked == [120, 240, 450, 700, 830], "480 was not the end"
    assert "samples-000000000700 is tried again: no answer" in capsys.readouterr().err


def test_a_refused_job_leaves_no_checkpoint_and_may_be_asked_for_again(run: Path, scheduler: Scheduler) -> None:
    scheduler.problem = InputError("account is over its limit")
    with pytest.raises(InputError, match="over its limit"):
        every(run).follow()
    assert not (evaluation_folder(run, "images", 120) / EVALUATED_FOLDER).exists()
    scheduler.problem = None
    assert every(run).follow() == 4


def test_what_has_failed_is_asked_for_again_while_its_checkpoint_is_there(run: Path, scheduler: Scheduler) -> None:
    every(run).follow()
    for samples in (120, 240):
        folder = evaluation_folder(run, "images", samples)
        (folder / FAILED_FILE).write_text('{"reason": "no weights"}')
        remove(folder / EVALUATED_FOLDER)
        line = (folder / "jobs.jsonl").read_text()
        (folder / "jobs.jsonl").write_text(line.replace(str(os.getpid()), "4194303"))  # a process that is gone
    remove(run / "checkpoints" / "samples-000000000240")
    assert every(run).follow() == 1
    assert scheduler.asked[4:] == [120]
    assert not (evaluation_folder(run, "images", 120) / FAILED_FILE).exists()
    assert len(read_submissions(evaluation_folder(run, "images", 120))) == 2


def test_other_options_under_the_same_name_are_refused(run: Path, scheduler: Scheduler, tmp_path: Path) -> None:
    every(run).follow()
    with pytest.raises(InputError, match=r"asked for with other options: .*--num 50.*; give another name"):
        every(run, command=COMMAND.replace("50", "100"))
    moved = run.rename(tmp_path / "moved")
    assert every(moved).follow() == 0, "a run may be moved"


def test_an_evaluation_of_the_recipe_is_left_to_the_run(run: Path) -> None:
    asked = [{"name": "images", "every_samples": 100, "run": [COMMAND]}]
    recipe = load_train_recipe(RECIPES / "quickstart.yaml", [f"evaluations={json.dumps(asked)}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError, match="the run itself starts"):
        every(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        every(tmp_path)
