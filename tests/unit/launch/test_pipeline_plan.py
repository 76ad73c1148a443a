"""A pipeline before it is submitted: what it asks for is checked whole, and a dry run leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.pipelines.launch import launch_pipeline
from launch.pipelines.plan import PipelinePlan, PlannedStage
from launch.submission.prepare import JobRequest
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.load import load_recipe
from pomscale.config.pipeline import PipelineRecipe
from pomscale.config.yaml_file import RecipeError

HERE = ClusterProfile(kind="cluster", scheduler="local", gpus_per_node=0, ranks_per_node=2, cpus_per_node=2)
GPUS = ClusterProfile(kind="cluster", scheduler="slurm", gpus_per_node=8, cpus_per_node=64, time_limit="1:00:00")
ENCODE = """
kind: encode
name: pets
output: data/pets
source: {kind: image_folder, path: pictures}
codec: {name: pixel, block: 2, channels: 3}
transform: {size: 8}
"""
TRAIN = """
kind: train
name: pets
codec: {name: pixel, block: 2, channels: 3}
data: {path: data/pets}
model: {latent_shape: [12, 4, 4], num_classes: 2, dim: 32, depth: 2}
training: {total_samples: 64, global_batch: 8}
checkpoint: {every_samples: 32}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "encode.yaml").write_text(ENCODE)
    (tmp_path / "train.yaml").write_text(TRAIN)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_command(words: list[str]) -> None:
    if words[0] not in ("data", "sample"):
        raise InputError(f"{words[0]} is no verb")


def write(folder: Path, stages: Sequence[str]) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text("kind: pipeline\nname: all\nstages:\n" + "".join(f"  - {stage}\n" for stage in stages))
    return path


def pipeline_of(path: Path) -> PipelineRecipe:
    recipe = load_recipe(path)
    assert isinstance(recipe, PipelineRecipe)
    return recipe


def plan(folder: Path, *stages: str, profile: ClusterProfile = HERE) -> list[PlannedStage]:
    path = write(folder, stages)
    recipe = pipeline_of(path)
    request = JobRequest(profile, "here", command_line=["pomscale"])
    planner = PipelinePlan(recipe, path, folder / "pipelines" / "all", request, check_command)
    return [planner.add(stage) for stage in recipe.stages]


def test_data_and_runs_that_earlier_stages_make_need_not_be_there(folder: Path) -> None:
    stages = plan(
        folder,
        "{name: encode, recipe: encode.yaml, array: 3}",
        "{name: verify, run: [data verify data/pets]}",
        "{name: train, recipe: train.yaml}",
        "{name: sample, run: ['sample {train} --out {sample}/grid.png']}",
    )
    assert [list(stage.record.after) for stage in stages] == [[], ["encode"], ["verify"], ["train"]]
    specs = [stage.prepared.spec for stage in stages if stage.prepared is not None]
    job_folders = [folder / identity for identity in ("pipelines/all/encode", "pipelines/all/verify", "runs/pets")]
    assert [Path(spec.job_folder) for spec in specs[:3]] == job_folders
    assert specs[3].commands == [["sample", str(job_folders[2]), "--out", f"{folder}/pipelines/all/sample/grid.png"]]
    assert [spec.is_run for spec in specs] == [False, False, True, False]
    assert [spec.ranks_per_node for spec in specs] == [1, 1, 2, 1], "a command is run once, not by every rank"


def test_data_that_no_awaited_stage_makes_must_be_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"stage train: .*data/pets"):
        plan(folder, "{name: encode, recipe: encode.yaml}", "{name: train, recipe: train.yaml, after: {}}")


def test_datasets_made_by_merge_and_split_count_too(folder: Path) -> None:
    made = plan(
        folder,
        "{name: encode, recipe: encode.yaml}",
        "{name: split, run: [data split data/pets data/a=0.9 data/b=0.1, data merge data/a data/b --out data/all]}",
        "{name: first, recipe: train.yaml, overrides: [name=first, data.path=data/a]}",
        "{name: second, recipe: train.yaml, overrides: [name=second, data.path=data/all], after: {split: ok}}",
    )
    assert len(made) == 4


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("{name: bad, recipe: encode.yaml, overrides: [shard_sampels=3]}", "stage bad: .*did you mean 'shard_samples'"),
        ("{name: bad, recipe: none.yaml}", "stage bad: .*none.yaml: no such"),
        ("{name: bad, recipe: pipeline.yaml}", "stage bad: recipe: pipeline.yaml is a pipeline itself"),
        ("{name: bad, recipe: train.yaml, array: 2}", "stage bad: array: only an encode"),
        ("{name: bad, run: [sing a song]}", "stage bad: sing is no verb"),
        ("{name: bad, recipe: encode.yaml, overrides: [source.path=nowhere]}", "stage bad: source.path: nowhere"),
        ("{name: bad, recipe: train.yaml, nodes: 3}", "stage bad: .*one node"),
    ],
)
def test_one_wrong_stage_is_told_before_anything_happens(folder: Path, stage: str, expected: str) -> None:
    path = write(folder, ["{name: encode, recipe: encode.yaml}", stage])
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=expected):
        launch_pipeline(
            pipeline_of(path),
            path,
            JobRequest(HERE, "here", command_line=["pomscale"]),
            check_command,
        )
    assert sorted(folder.rglob("*")) == before


def test_two_stages_may_not_train_the_same_run(folder: Path) -> None:
    train = "recipe: train.yaml, after: {encode: ok}"
    with pytest.raises(InputError, match=r"stage again: trains in .*runs/pets, as stage train does"):
        plan(folder, "{name: encode, recipe: encode.yaml}", f"{{name: train, {train}}}", f"{{name: again, {train}}}")


def test_a_dry_run_shows_all_stages_and_what_would_be_refused(folder: Path) -> None:
    path = write(folder, ["{name: encode, recipe: encode.yaml}", "{name: train, recipe: train.yaml, after: {}}"])
    request = JobRequest(GPUS, "here", command_line=["pomscale"], dry_run=True)
    told, (refusal,) = launch_pipeline(pipeline_of(path), path, request, check_command)
    assert [line.split()[0] for line in told.splitlines()[2:]] == ["encode", "train"]
    assert refusal.startswith("stage train: dataset data/pets: there is no such folder")


@pytest.mark.parametrize(
    ("command", "expected"),
    [("sample {trian}", "{trian} is no stage up to this one"), ("sample 'x", "No closing quotation")],
)
def test_commands_are_checked_with_the_recipe(folder: Path, command: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        pipeline_of(write(folder, [f'{{name: sample, run: ["{command}"]}}']))


def test_commands_get_one_gpu_unless_they_ask(folder: Path) -> None:
    stages = plan(
        folder,
        "{name: one, run: [data info x]}",
        "{name: none, run: [data info x], gpus_per_node: 0}",
        "{name: two, run: [data info x], gpus_per_node: 2}",
        profile=GPUS,
    )
    asked = [(one.prepared.gpus_per_node, one.prepared.spec.ranks_per_node) for one in stages if one.prepared]
    assert asked == [(1, 1), (0, 1), (2, 2)]


def test_a_dry_run_shows_the_stages_and_writes_nothing(folder: Path) -> None:
    path = write(
        folder,
        [
            "{name: encode, recipe: encode.yaml, array: 3}",
            "{name: train, recipe: train.yaml}",
            "{name: clean, run: [data info data/pets], after: {encode: ok, train: any}}",
        ],
    )
    before = sorted(folder.rglob("*"))
    request = JobRequest(HERE, "here", command_line=["pomscale"], dry_run=True)
    told, refusals = launch_pipeline(pipeline_of(path), path, request, check_command)
    assert refusals == []
    assert sorted(folder.rglob("*")) == before
    rows = [line.split("  ") for line in told.splitlines()]
    assert "not submitted" in told
    assert [row[1] for row in rows[2:]] == ["encode", "train", "clean"]
    assert "3 tasks of 1 x 1" in told
    assert "encode, train (however it ends)" in told
