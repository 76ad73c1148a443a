"""Which checkpoints of a run are evaluated, when, and what becomes of their files. The scheduler is left out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.evaluation_job import evaluation_commands
from launch.node import evaluations
from launch.node.evaluations import Evaluations, evaluation_folder, note_failure
from launch.record.job import JobSpec, LaunchedAs, StartRecord, Verdict, keep, start_folder
from pomscale.base.errors import InputError, PomscaleError
from pomscale.cli import _parser as command_parser
from pomscale.cli.evaluate.record import read_figures
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.load import dump_recipe, load_recipe, load_train_recipe
from pomscale.config.pipeline import PipelineRecipe, fill_in
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError
from pomscale.runs import checkpoint_folder
from pomscale.runs.checkpoint_folder import complete_checkpoints, remove, samples_of
from pomscale.runs.evaluation_log import read_evaluations
from pomscale.runs.layout import EVALUATED_FOLDER, FAILED_FILE, JOB_FILE, JOBS_FILE, LAUNCH_FILE
from support.paths import RECIPES
from support.running import pomscale

SAMPLE, MEASURE = (
    "sample {checkpoint} --npz {folder}/s.npz",
    "evaluate digits {folder}/s.npz --out {folder}/figures.json",
)


def asks(*names: str, every_samples: int = 100, run: tuple[str, ...] = (SAMPLE, MEASURE)) -> str:
    """The override of a recipe."""
    return f"evaluations={json.dumps([{'name': name, 'every_samples': every_samples, 'run': run} for name in names])}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A launched run with evaluations a and b, every 100 samples."""
    folder = tmp_path / "run"
    (folder / "launch").mkdir(parents=True)
    recipe = load_train_recipe(RECIPES / "quickstart.yaml", [asks("a", "b")])
    (folder / "launch" / "recipe.yaml").write_text(dump_recipe(recipe))
    keep(folder / LAUNCH_FILE, LaunchedAs("launch/recipe.yaml", "here", {}, 1, None, []))
    keep(folder / JOB_FILE, JobSpec(str(folder), "run", [], str(tmp_path)))
    return folder


def save(run: Path, samples: int) -> Path:
    folder = run / "checkpoints" / f"samples-{samples:012d}"
    (folder / "ranks").mkdir(parents=True)
    for name in ("checkpoint.json", "ranks/0.bin", "COMPLETE"):
        (folder / name).write_text(f"{samples} {name}")
    return folder


class Scheduler:
    """Stands for launch.evaluation_job: what it was asked for, and whether it takes it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.refuses: str | None = None

    def submit(self, run: Path, name: str, samples: int) -> None:
        self.asked.append((name, samples))
        job_folder = evaluation_folder(run, name, samples)
        assert [samples_of(path) for path in complete_checkpoints(run / "checkpoints")], "there is one to evaluate"
        assert (job_folder / EVALUATED_FOLDER / "COMPLETE").is_file(), "all of it is there when the job is submitted"
        if self.refuses is not None:
            raise PomscaleError(self.refuses)
        line = {"job_id": str(os.getpid()), "submitted_unix_s": time.time(), "scheduler": "local", "num_nodes": 1}
        (job_folder / JOBS_FILE).write_text(json.dumps(line) + "\n")


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    scheduler = Scheduler()
    monkeypatch.setattr(evaluations, "_submit", scheduler.submit)
    return scheduler


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    offset_s = 0.0
    monotonic = time.monotonic

    def pass_time(seconds: float) -> None:
        nonlocal offset_s
        offset_s += seconds

    monkeypatch.setattr("launch.node.evaluations.time.monotonic", lambda: monotonic() + offset_s)
    return pass_time


def test_the_first_checkpoint_after_each_multiple(run: Path, scheduler: Scheduler) -> None:
    watching = Evaluations(run)
    for samples in (60, 120, 180, 240, 450, 480):
        save(run, samples)
        watching.poll()
        watching.poll()
    assert scheduler.asked == [(name, samples) for samples in (120, 240, 450) for name in ("a", "b")]


def test_a_checkpoint_that_is_being_written_is_not_looked_at(run: Path, scheduler: Scheduler) -> None:
    marker = save(run, 120) / "COMPLETE"
    marker.unlink()
    Evaluations(run).poll()
    assert scheduler.asked == []


def test_the_last_checkpoint_is_evaluated_in_any_case(run: Path, scheduler: Scheduler) -> None:
    watching = Evaluations(run)
    save(run, 120)
    watching.poll()
    save(run, 160)
    watching.poll(finished=True)
    watching.poll(finished=True)
    assert scheduler.asked == [("a", 120), ("b", 120), ("a", 160), ("b", 160)]


def test_another_start_of_the_run_goes_on(run: Path, scheduler: Scheduler) -> None:
    save(run, 120)
    Evaluations(run).poll()
    # The supervisor is killed after it has linked a checkpoint, and before it could submit.
    (evaluation_folder(run, "a", 120) / JOBS_FILE).unlink()
    scheduler.asked.clear()
    Evaluations(run).poll()
    assert scheduler.asked == [("a", 120)]


def test_retention_does_not_take_a_checkpoint_away(run: Path, scheduler: Scheduler) -> None:
    checkpoint = save(run, 120)
    Evaluations(run).poll()
    linked = evaluation_folder(run, "a", 120) / EVALUATED_FOLDER
    assert (linked / "ranks" / "0.bin").samefile(checkpoint / "ranks" / "0.bin"), "a link, not a copy"
    remove(checkpoint)
    assert (linked / "ranks" / "0.bin").read_text() == "120 ranks/0.bin"


def test_a_checkpoint_that_goes_while_it_is_linked(
    run: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(run, 120)
    link = checkpoint_folder.link_or_copy

    def gone_in_between(source: Path, target: Path) -> bool:
        remove(checkpoint)
        return link(source, target)

    monkeypatch.setattr(checkpoint_folder, "link_or_copy", gone_in_between)
    Evaluations(run).poll()
    assert scheduler.asked == []
    assert not (evaluation_folder(run, "a", 120) / EVALUATED_FOLDER).exists()


def test_a_refusal_is_told_once_and_tried_again_for_a_while(
    run: Path, scheduler: Scheduler, pass_time: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 120)
    scheduler.refuses = "account is over its limit"
    watching = Evaluations(run)
    for _ in range(10):
        watching.poll()
    assert scheduler.asked == [("a", 120), ("b", 120)], "not before a minute has passed"
    assert capsys.readouterr().err.count("over its limit") == 2
    for _ in range(10):
        pass_time(61)
        watching.poll()
    assert scheduler.asked == [("a", 120), ("b", 120)] * 3
    job_folder = evaluation_folder(run, "a", 120)
    assert json.loads((job_folder / FAILED_FILE).read_text()) == {"reason": "account is over its limit"}
    assert not (job_folder / EVALUATED_FOLDER).exists(), "its files are let go"
    assert capsys.readouterr().err.count("has failed") == 2
    scheduler.refuses = None
    save(run, 240)
    Evaluations(run).poll()
    assert scheduler.asked[-2:] == [("a", 240), ("b", 240)], "the next one is tried afresh"


def test_an_evaluation_that_failed_is_listed_and_its_files_go(
    run: Path, scheduler: Scheduler, pass_time: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 120)
    watching = Evaluations(run)
    watching.poll()
    bad, good = (evaluation_folder(run, name, 120) for name in ("a", "b"))
    for job_folder, action, reason in ((bad, "fail", "rank 0: no such folder"), (good, "done", "finished")):
        start = start_folder(job_folder, str(os.getpid()), 0)
        keep(start / "start.json", StartRecord(str(os.getpid()), 0, ["here"], 1, time.time(), -1))
        keep(start / "verdict.json", Verdict(action, reason, int(action == "fail"), time.time()))  # type: ignore[arg-type]
    pass_time(61)
    watching.poll()
    watching.poll()
    assert json.loads((bad / FAILED_FILE).read_text()) == {"reason": "rank 0: no such folder"}
    assert not (bad / EVALUATED_FOLDER).exists()
    assert not (good / FAILED_FILE).exists()
    assert capsys.readouterr().err.count("rank 0: no such folder") == 1


def test_an_evaluation_notes_its_own_failure(run: Path, scheduler: Scheduler) -> None:
    """Its supervisor does, which knows nothing of evaluations: it says so of every job that fails."""
    save(run, 120)
    Evaluations(run).poll()
    job_folder = evaluation_folder(run, "a", 120)
    note_failure(job_folder, "no such folder")
    assert json.loads((job_folder / FAILED_FILE).read_text()) == {"reason": "no such folder"}
    assert not (job_folder / EVALUATED_FOLDER).exists()
    (run / EVALUATED_FOLDER).mkdir()
    note_failure(run, "diverged")
    assert (run / EVALUATED_FOLDER).is_dir()
    assert not (run / FAILED_FILE).exists()


def test_a_disk_that_takes_nothing_does_not_end_the_run(
    run: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise PomscaleError("no space left")

    save(run, 120)
    watching = Evaluations(run)
    for module, name in ((checkpoint_folder, "link_or_copy"), (evaluations, "write_text")):
        monkeypatch.setattr(module, name, full)
    watching.poll(finished=True)
    assert "no space left" in capsys.readouterr().err


# --- what a job does -------------------------------------------------------------------------------------------------


def test_commands_are_filled_in_word_by_word(tmp_path: Path) -> None:
    run = tmp_path / "with space"
    config = EvaluationConfig(name="fid", every_samples=1, run=["sample {checkpoint} --seed {samples}", MEASURE])
    job_folder = str(evaluation_folder(run, "fid", 42))
    first, second, record = evaluation_commands(config, run, 42)
    assert first == ["sample", f"{job_folder}/checkpoint", "--seed", "42"]
    assert second[-1] == f"{job_folder}/figures.json"
    assert record[:5] == ["evaluate", "record", str(run), "fid", "42"]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ((SAMPLE,), "must name {folder}/figures.json"),
        (("sample {chekpoint}", MEASURE), "{chekpoint} is none of {checkpoint}, {samples}, {folder}"),
        (("sample {checkpoint", MEASURE), "expected '}'"),
        (("sample '{checkpoint}", MEASURE), "No closing quotation"),
    ],
)
def test_a_recipe_tells_what_is_wrong_with_a_command(run: tuple[str, ...], expected: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluations\.0\.run: ") as told:
        load_recipe(RECIPES / "quickstart.yaml", [asks("a", run=run)])
    assert expected in str(told.value)


def test_two_evaluations_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="evaluations: two of them have the same name"):
        load_recipe(RECIPES / "quickstart.yaml", [asks("a", "a")])


def test_shipped_commands_are_commands() -> None:
    """Of evaluations and of pipelines, as the recipes have them."""
    commands = []
    for path in RECIPES.rglob("*.yaml"):
        recipe = load_recipe(path)
        if isinstance(recipe, TrainRecipe):
            commands += [
                words for config in recipe.evaluations for words in evaluation_commands(config, Path("run"), 1)
            ]
        elif isinstance(recipe, PipelineRecipe):
            job_folders = {stage.name: Path(stage.name) for stage in recipe.stages}
            commands += [fill_in(command, job_folders) for stage in recipe.stages for command in stage.run]
    assert len(commands) > 8
    for words in commands:
        assert command_parser().parse_args(words).run, words


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_numbers_and_lists_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"fid": 9.5, "num": 3, "by_bin": [0.5, null, 2], "ok": true, "note": "text", "none": null}')
    assert read_figures(path) == ({"fid": 9.5, "num": 3.0, "by_bin_00": 0.5, "by_bin_02": 2.0}, {})
    path.write_text(json.dumps({"metrics": {"fid": 9.5}, "settings": {"steps": 50}}))
    assert read_figures(path) == ({"fid": 9.5}, {"steps": 50})


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[1]", "must be an object"), ('{"a": "b"}', "no number")],
)
def test_what_is_no_file_of_figures_is_refused(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=expected):
        read_figures(path)


def test_record_adds_to_the_run_and_lets_the_checkpoint_go(tmp_path: Path) -> None:
    folder, evaluated = tmp_path / "evaluation", save(tmp_path, 64)
    folder.mkdir()
    recipe = load_recipe(RECIPES / "quickstart.yaml", ["monitoring.wandb.mode=disabled"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "figures.json").write_text('{"fid": 9.5}')
    for name in ("grid.png", "best.mp4", "best.png"):
        (folder / name).write_bytes(b"not looked at")
    (folder / "samples.npz").write_bytes(b"not recorded")
    words = ["evaluate", "record", str(tmp_path), "fid", "64", str(folder / "figures.json")]
    pomscale(*words)
    assert evaluated.is_dir()
    pomscale(*words, "--evaluated", evaluated)
    assert not evaluated.exists()
    (first, _) = read_evaluations(tmp_path)
    assert (first.samples, first.metrics) == (64, {"evaluation/fid/fid": 9.5})
    assert first.pictures == {
        "evaluation/fid/grid": folder / "grid.png",
        "evaluation/fid/best": folder / "best.mp4",
        "evaluation/fid/best_sheet": folder / "best.png",
    }
