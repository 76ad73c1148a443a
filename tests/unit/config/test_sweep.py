"""A grid in a recipe: which runs it is, what they are called, and where it says that a point is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.pipelines.sweep import plan_sweep, sweep_table
from launch.submission.prepare import JobRequest
from pomscale.base.names import MAX_NAME_BYTES
from pomscale.config.load import load_cluster
from pomscale.config.sweep import load_points
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeError
from pomscale.runs.layout import CHECKPOINT_META
from pomscale.runs.outcome import write_outcome

RECIPE = """\
kind: train
name: grid
codec: {name: pixel, block: 2, channels: 1}
data: {path: latents}
model: {latent_shape: [4, 4, 4], num_classes: 10, patch_size: 1, dim: 32, depth: 2}
training: {total_samples: 640, global_batch: 32}
checkpoint: {every_samples: 320}
sweep:
  optimizer.lr: [1e-4, 3e-5]
  model.degree: [2, 3]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(RECIPE)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_points(path, list(overrides))
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_one_run_per_point_with_a_name_and_one_group(path: Path) -> None:
    points = load_points(path, ["optimizer.weight_decay=0.1"])
    assert [point.recipe.name for point in points] == [
        "grid.lr=0.0001-degree=2",
        "grid.lr=0.0001-degree=3",
        "grid.lr=3e-05-degree=2",
        "grid.lr=3e-05-degree=3",
    ]
    assert [(point.recipe.optimizer.lr, point.recipe.model.degree) for point in points] == [
        (1e-4, 2),
        (1e-4, 3),
        (3e-5, 2),
        (3e-5, 3),
    ]
    for point in points:
        assert point.recipe.sweep == {}
        assert point.recipe.monitoring.wandb.group == "grid"
        assert point.recipe.optimizer.weight_decay == 0.1
    assert points[1].values == {"optimizer.lr": 1e-4, "model.degree": 3}


def test_a_group_that_the_recipe_names_stays(path: Path) -> None:
    assert load_points(path, ["monitoring.wandb.group=mine"])[0].recipe.monitoring.wandb.group == "mine"


def test_a_whole_section_may_be_swept_and_labels_stay_apart(path: Path) -> None:
    values = '"optimizer.betas": [[0.9, 0.95]], "data.path": [a/b], "validation.path": [x], "compute.compile": [true]'
    sweep = f"sweep={{{values}}}"
    (point,) = load_points(path, [sweep, "validation={path: y, every_samples: 32}"])
    assert point.recipe.name == "grid.betas=0.9_0.95-data.path=a_b-validation.path=x-compile=true"


def test_a_recipe_without_a_sweep_has_no_points(path: Path) -> None:
    assert load_points(path, ["sweep={}"]) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "[1e-4, 3e-5]",
            "[1e-4, -1]",
            "grid.yaml:9: optimizer.lr: input should be greater than 0, got -1 (sweep: lr=-1-degree=2)",
        ),
        (
            "model.degree",
            "model.degre",
            "grid.yaml:10: model.degre: unknown key; did you mean 'degree'? (sweep: lr=0.0001-degre=2)",
        ),
        (
            "model.degree: [2, 3]",
            "training.total_samples: [640, 650]",
            "grid.yaml:10: training.total_samples: 650 is not a multiple of training.global_batch 32 "
            "(sweep: lr=0.0001-total_samples=650)",
        ),
        ("model.degree: [2, 3]", "name: [a, b]", "grid.yaml:10: sweep: 'name' cannot be changed by a sweep"),
        ("[2, 3]", "[2, 2]", "grid.yaml:8: sweep: 2 points would be called grid.lr=0.0001-degree=2; a value is"),
        ("[2, 3]", "[]", "grid.yaml:10: sweep.model.degree: list should have at least 1 item"),
        ("[2, 3]", "2", "grid.yaml:10: sweep.model.degree: input should be a valid list, got 2"),
    ],
)
def test_a_bad_point_is_told_with_the_line_of_the_sweep(path: Path, old: str, new: str, expected: str) -> None:
    path.write_text(RECIPE.replace(old, new, 1))
    (problem, *more) = problems(path)
    assert problem.startswith(expected)
    assert len(more) <= 1  # the same name twice, for the other rate


def test_values_that_differ_only_in_characters_of_no_folder_have_names_of_their_own(path: Path) -> None:
    points = load_points(path, ['sweep={data.path: ["a b", a_b, a/b, "a c"]}'])
    names = [point.recipe.name for point in points]
    assert len(set(names)) == 4
    assert (names[1], names[3]) == ("grid.path=a_b", "grid.path=a_c")


def test_launching_again_takes_only_what_is_left(path: Path, digits: Path, tmp_path: Path) -> None:
    overrides = [f"data.path={digits}/latents/train", f"output={tmp_path}/runs", "compute.device=cpu"]
    points = load_points(path, overrides)
    finish(points[1].recipe)
    planned = plan_sweep(points, JobRequest(load_cluster("local"), "local"))
    assert [(one.state, one.prepared is not None) for one in planned] == [
        ("new", True),
        ("finished", False),
        ("new", True),
        ("new", True),
    ]
    assert not planned[0].job_folder.exists()
    lines = sweep_table(planned, {planned[0].job_folder: "17"}).splitlines()
    assert lines[0].split() == ["job", "optimizer.lr", "model.degree", "run"]
    assert lines[1].split() == ["17", "0.0001", "2", "grid.lr=0.0001-degree=2"]
    assert lines[2].split() == ["finished", "0.0001", "3", "grid.lr=0.0001-degree=3"]


def test_a_name_that_is_too_long_for_a_folder_is_shortened(path: Path) -> None:
    points = load_points(path, [f"name={'long-' * 45}"])
    names = [point.recipe.name for point in points]
    assert len(set(names)) == 4
    assert {len(name) for name in names} == {MAX_NAME_BYTES}
    assert {point.recipe.monitoring.wandb.group for point in points} == {"long-" * 45}


def finish(recipe: TrainRecipe) -> None:
    """What a run that has come to its end leaves, as far as a launch looks."""
    job_folder = Path(recipe.output) / recipe.name
    checkpoint = job_folder / "checkpoints" / f"samples-{recipe.training.total_samples:012d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKPOINT_META).write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    (checkpoint / "COMPLETE").write_text("")
    write_outcome(job_folder, 1, 0, "finished", samples=recipe.training.total_samples)
