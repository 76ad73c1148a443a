"""A job folder is what it is where it lies: after a move or a copy its job runs there, and nowhere else."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch.record.job import JobSpec, LaunchedAs, keep
from launch.record.moved import recipe_here, spec_here, train_command
from launch.record.pipeline import PIPELINE_FILE, Pipeline, Stage, stage_folders, write_pipeline
from launch.submission import control
from pomscale.base.errors import InputError
from pomscale.config.load import dump_recipe, load_train_recipe
from pomscale.runs.layout import JOB_FILE, LAUNCH_FILE, LAUNCHED_RECIPE_FILE, RECIPE_FILE
from support.running import write_tiny_recipe


def spec(folder: Path, *commands: list[str]) -> JobSpec:
    return JobSpec(str(folder), folder.name, list(commands), str(folder.parent), is_run=True)


def test_all_paths_of_the_job_folder_follow_it(tmp_path: Path) -> None:
    then, now = tmp_path / "a", tmp_path / "b"
    now.mkdir()
    words = [f"{then}/launch/recipe.yaml", f"--out={then}", f"{then}b/x", f"/mnt{then}/x", str(tmp_path / "data")]
    moved = spec_here(spec(then, ["train", *words]), now)
    expected = [f"{now}/launch/recipe.yaml", f"--out={now}", *words[2:]]
    assert moved == replace(spec(then), job_folder=str(now), commands=[["train", *expected]])


def test_another_path_of_the_same_folder_is_no_move(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    job = spec(tmp_path / "a", ["train", f"{tmp_path}/a/launch/recipe.yaml"])
    assert spec_here(job, tmp_path / "link") == job


def test_an_evaluation_follows_its_run(tmp_path: Path) -> None:
    inside = Path("evaluations", "fid", "samples-000000000064")
    then, now = tmp_path / "a", tmp_path / "b"
    (now / inside).mkdir(parents=True)
    job = replace(
        spec(then / inside, ["evaluate", "record", str(then), "--evaluated", f"{then / inside}/checkpoint"]),
        cwd=str(tmp_path),
    )
    moved = spec_here(job, now / inside)
    assert moved.commands == [["evaluate", "record", str(now), "--evaluated", f"{now / inside}/checkpoint"]]


def test_a_stage_follows_those_that_moved_with_it_in_the_folder_of_its_pipeline(tmp_path: Path) -> None:
    then, now, elsewhere = tmp_path / "pipe", tmp_path / "pipe2", tmp_path / "run"
    stages = [Stage("train", str(elsewhere), {}, ""), Stage("clips", str(then / "clips"), {}, "")]
    stages.append(Stage("clips-check", str(then / "clips-check"), {}, ""))
    write_pipeline(then, Pipeline("pipe", "local", [], str(tmp_path), stages))
    for folder in (then / "clips", then / "clips-check", elsewhere):
        folder.mkdir()
    words = ["sample", str(elsewhere), f"--data={then}/clips/x", f"--out={then}/clips-check"]
    job = replace(spec(then / "clips-check", words), cwd=str(tmp_path))
    then.rename(now)
    moved = spec_here(job, now / "clips-check")
    assert moved.commands == [["sample", str(elsewhere), f"--data={now}/clips/x", f"--out={now}/clips-check"]]


def test_a_checkout_that_was_moved_with_its_runs_is_found(tmp_path: Path) -> None:
    now = tmp_path / "new" / "runs" / "a"
    now.mkdir(parents=True)
    old = tmp_path / "old"
    job = replace(spec(old / "runs" / "a"), cwd=str(old))
    assert spec_here(job, now).cwd == str(tmp_path / "new")
    with pytest.raises(InputError, match=f"launched from {old}, which is gone"):
        spec_here(replace(job, job_folder=str(tmp_path / "elsewhere" / "a")), now)


def test_a_recipe_trains_in_the_folder_that_is_named(tmp_path: Path) -> None:
    recipe = load_train_recipe(write_tiny_recipe(tmp_path, tmp_path / "digits"))
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    assert train_command(run) == f"pomscale train {run / RECIPE_FILE}"
    (run / RECIPE_FILE).write_text(dump_recipe(recipe))
    assert train_command(run) == f"pomscale train {run / RECIPE_FILE}"
    copy = run.rename(tmp_path / "copy")
    assert train_command(copy) == f"pomscale train {copy / RECIPE_FILE} name=copy output={tmp_path}"
    moved = recipe_here(recipe, copy)
    assert (moved.name, moved.output, moved.seed) == ("copy", str(tmp_path), recipe.seed)


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "2024-01-02", "a copy"])
def test_a_folder_whose_name_yaml_would_read_as_something_else(tmp_path: Path, name: str) -> None:
    recipe = load_train_recipe(write_tiny_recipe(tmp_path, tmp_path / "digits"))
    run = tmp_path / "#: {runs" / name
    run.mkdir(parents=True)
    (run / RECIPE_FILE).write_text(dump_recipe(recipe))
    words = shlex.split(train_command(run))
    if " " in name:  # in the folder of the original it must not train, so it is refused
        with pytest.raises(InputError, match=f"name={name}"):
            load_train_recipe(words[2], words[3:])
        with pytest.raises(InputError, match="a run cannot have the name of this folder"):
            recipe_here(recipe, run)
        return
    for here in (load_train_recipe(words[2], words[3:]), recipe_here(recipe, run)):
        assert (here.name, here.output) == (name, str(run.parent))


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_run_is_submitted_again_where_its_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    profile = {"kind": "cluster", "scheduler": "local", "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
    run = tmp_path / "runs" / "tiny"
    submitted: list[JobSpec] = []

    def submit(job: JobSpec, *arguments: object) -> str:
        submitted.append(job)
        return "7"

    recipe = load_train_recipe(write_tiny_recipe(tmp_path, tmp_path / "digits"))
    (run / LAUNCHED_RECIPE_FILE).parent.mkdir(parents=True)
    (run / LAUNCHED_RECIPE_FILE).write_text(dump_recipe(recipe))
    keep(run / JOB_FILE, spec(run, ["train", str(run / LAUNCHED_RECIPE_FILE)]))
    keep(run / LAUNCH_FILE, LaunchedAs(LAUNCHED_RECIPE_FILE, "local", profile, 1, None, []))
    before = (run / JOB_FILE).read_bytes(), (run / LAUNCHED_RECIPE_FILE).read_bytes()
    here = tmp_path / "runs" / "other"
    here = run.rename(here) if how == "moved" else Path(shutil.copytree(run, here))

    monkeypatch.setattr(control, "submit", submit)
    assert control.resume(here) == "7"
    (job,) = submitted
    assert (job.job_folder, job.name, job.commands) == (
        str(here),
        "other",
        [["train", str(here / LAUNCHED_RECIPE_FILE)]],
    )
    resolved = load_train_recipe(here / LAUNCHED_RECIPE_FILE)
    assert Path(resolved.output, resolved.name) == here
    if how == "copied":
        assert before == ((run / JOB_FILE).read_bytes(), (run / LAUNCHED_RECIPE_FILE).read_bytes())


def test_a_job_that_is_refused_leaves_its_description_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: JobSpec, *arguments: object) -> str:
        keep(Path(job.job_folder) / JOB_FILE, job)
        raise InputError("sbatch refuses this job")

    profile = {"kind": "cluster", "scheduler": "local", "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
    keep(tmp_path / JOB_FILE, spec(tmp_path / "elsewhere"))
    keep(tmp_path / LAUNCH_FILE, LaunchedAs(None, "local", profile, 1, None, []))
    monkeypatch.setattr(control, "submit", refuse)
    with pytest.raises(InputError, match="refuses"):
        control.resume(tmp_path)
    assert JobSpec.read(tmp_path / JOB_FILE) == spec(tmp_path / "elsewhere")


@pytest.mark.parametrize("names_its_folder", [True, False])
def test_the_stages_of_a_pipeline_follow_it(tmp_path: Path, names_its_folder: bool) -> None:
    then, now = tmp_path / "old" / "all", tmp_path / "new" / "all"
    for stage in ("encode", "../train"):
        (now / stage).mkdir(parents=True)
    homes = {"encode": then / "encode", "train": then.parent / "train", "gone": tmp_path / "elsewhere"}
    stages = [Stage(name, str(home), {}, "") for name, home in homes.items()]
    write_pipeline(then, Pipeline("all", "local", [], "/", stages))
    content = json.loads((then / PIPELINE_FILE).read_text())
    assert content["home"] == str(then)
    train = now.parent / "train"
    if not names_its_folder:  # as an older version has written it: only what lies inside is found
        del content["home"]
        train = then.parent / "train"
    assert stage_folders(now, content) == [now / "encode", train, tmp_path / "elsewhere"]


def test_a_profile_that_is_refused_by_now_is_named_with_the_remedy(tmp_path: Path) -> None:
    profile = {"kind": "cluster", "scheduler": "slurm", "gpus_per_node": 8, "cpus_per_node": 8, "time_limit": "1:00:00"}
    older = profile | {"srun": ["--export=NONE"]}
    keep(tmp_path / JOB_FILE, spec(tmp_path))
    words = ["pomscale", "launch", "a recipe.yaml", "--cluster", "ours"]
    keep(tmp_path / LAUNCH_FILE, LaunchedAs(None, "ours", older, 1, None, words))
    told = f"{LAUNCH_FILE}: srun: --export=NONE: .*\\n.*goes on: pomscale launch 'a recipe.yaml' --cluster ours"
    with pytest.raises(InputError, match=told):
        control.resume(tmp_path)
