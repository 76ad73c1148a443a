"""Recipes of kind experiment: their grid, their seeds, what each point runs, and everything that is refused."""

from __future__ import annotations

import json
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pomscale.cli import _parser
from pomscale.cli.arguments import unknown_words
from pomscale.config.load import dump_recipe, load_experiment, load_recipe, load_train_recipe
from pomscale.config.mixer import AttentionMixer
from pomscale.config.pipeline import PipelineRecipe
from pomscale.config.yaml_file import RecipeError
from pomscale.experiments.jobs import pipeline
from pomscale.experiments.points import Experiment, read_experiment
from pomscale.plan.report import plan
from support.paths import RECIPES, ROOT

TRAIN = """
kind: train
name: digits
codec: {name: pixel, block: 2, channels: 1}
data: {path: data/digits}
model: {latent_shape: [4, 4, 4], num_classes: 10, patch_size: 1, dim: 32, depth: 2, num_heads: 2}
training: {total_samples: 640, global_batch: 32}
checkpoint: {every_samples: 640}
"""

EXPERIMENT = """
kind: experiment
name: grid
trainings:
  low: {recipe: train.yaml, overrides: [optimizer.lr=3e-4]}
  high: {recipe: train.yaml, overrides: ["model.latent_shape=[4,8,8]"]}
axes:
  mixer: {values: {PoM: {}, attention: {model.mixer: attention}}}
  start: {of: [high], values: {tuned: {init_from.path: "{low}"}, scratch: {}}}
  guidance: {values: [0, 1.5]}
seeds: [4, 7]
run:
  - sample {high} --seed {seed} --guidance {guidance} --out "{folder}/a grid.png"
measures:
  loss: {metric: train/loss}
plot: {x: guidance, y: [loss]}
small:
  seeds: [1]
  axes: {guidance: {values: [0]}}
"""


SHIPPED = sorted(path for path in RECIPES.glob("experiments/*.yaml") if "kind: experiment" in path.read_text())


@cache
def shipped(path: Path, small: bool) -> Experiment:
    return read_experiment(path, small=small)


def write(folder: Path, text: str = EXPERIMENT) -> Path:
    (folder / "train.yaml").write_text(TRAIN)
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str, small: bool = False) -> str:
    with pytest.raises(RecipeError) as raised:
        read_experiment(path, list(overrides), small=small)
    assert len(raised.value.problems) == 1, raised.value.problems
    return raised.value.problems[0]


def test_the_grid_is_all_values_with_all_seeds_and_shares_runs(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path))
    assert [(*point.values.values(), point.seed) for point in experiment.points] == [
        (mixer, start, guidance, seed)
        for mixer in ("PoM", "attention")
        for start in ("tuned", "scratch")
        for guidance in ("0", "1.5")
        for seed in (4, 7)
    ]
    assert sorted(one.name for one in experiment.trainings) == sorted(
        [f"low.mixer-{mixer}.seed-{seed}" for mixer in ("PoM", "attention") for seed in (4, 7)]
        + [
            f"high.mixer-{mixer}.start-{start}.seed-{seed}"
            for mixer in ("PoM", "attention")
            for start in ("tuned", "scratch")
            for seed in (4, 7)
        ]
    )


def test_a_training_is_what_its_words_train(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path))
    for training in experiment.trainings:
        assert load_train_recipe(training.recipe_file, training.words[2:]) == training.recipe
    (tuned,) = (one for one in experiment.trainings if one.name == "high.mixer-attention.start-tuned.seed-7")
    assert tuned.recipe.seed == 7
    assert tuned.recipe.model.mixers[0] == AttentionMixer(2)
    assert tuned.needs == ["low.mixer-attention.seed-7"]
    assert tuned.recipe.init_from is not None
    assert Path(tuned.recipe.init_from.path) == Path("experiments/grid/runs/low.mixer-attention.seed-7")
    assert tuned.folder == Path("experiments/grid/runs", tuned.name)


def test_commands_name_the_runs_the_values_and_the_folder(tmp_path: Path) -> None:
    point = read_experiment(write(tmp_path)).points[-1]
    assert point.commands == [
        [
            *("sample", "experiments/grid/runs/high.mixer-attention.start-scratch.seed-7", "--seed", "7"),
            *("--guidance", "1.5", "--out", f"{point.folder}/a grid.png"),
        ]
    ]


def test_an_axis_of_words_stands_for_several_in_a_command(tmp_path: Path) -> None:
    axes = """{mixer: {values: {v2: "'mixer={kind: pom, form: coefficients}' degree=3", v1: mixer=pom}}}"""
    run = "-m pomscale.experiments.recall --out {folder}/{mixer}.json {mixer}"
    path = write(tmp_path, EXPERIMENT.split("trainings:", maxsplit=1)[0])
    measures = "measures={a: {file: b.json, key: c}}"
    experiment = read_experiment(path, [f"axes={axes}", f'run=["{run}"]', measures, "plot={x: mixer, y: [a]}"])
    words = experiment.points[0].commands[0]
    assert words[-2:] == ["mixer={kind: pom, form: coefficients}", "degree=3"]
    assert experiment.points[-1].commands[0][-2:] == [f"{experiment.points[-1].folder}/mixer=pom.json", "mixer=pom"]


def test_small_fields_replace_whole_fields_and_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text().replace("guidance: {values: [0]}", "start: {of: [high], values: {scratch: {}}}")
    path.write_text(text.replace("small:", "small:\n  run: []\n  plot: {x: start, y: [loss]}"))
    small = load_experiment(path, ["seeds=[5]"], small=True)
    assert (small.name, small.seeds, list(small.axes)) == ("grid-small", [5], ["start"])
    assert load_recipe(path).model_dump() != small.model_dump()


def test_a_dumped_experiment_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(dumped) == recipe


def test_as_a_pipeline_each_step_waits_for_what_it_needs(tmp_path: Path) -> None:
    stages = {stage["name"]: stage for stage in pipeline(read_experiment(write(tmp_path)))["stages"]}
    assert stages["high.mixer-PoM.start-tuned.seed-4"]["after"] == {"low.mixer-PoM.seed-4": "ok"}
    assert stages["high.mixer-PoM.start-scratch.seed-4"]["after"] == {}
    point = stages["mixer-PoM.start-tuned.guidance-1.5.seed-4"]
    assert set(point["after"]) == {"low.mixer-PoM.seed-4", "high.mixer-PoM.start-tuned.seed-4"}
    assert f"--only {point['name']}" in point["run"][0]
    *others, last = stages.values()
    assert set(last["after"]) == {stage["name"] for stage in others}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_experiment_is_a_valid_pipeline(path: Path) -> None:
    made = PipelineRecipe.model_validate(pipeline(shipped(path, False)))
    assert len(made.stages) == len(shipped(path, False).trainings) + len(shipped(path, False).points) + 1


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("measures={loss: {}}", "measures.loss: give exactly one of `metric`, `file`, `plan`"),
        ("measures={loss: {file: a.json}}", "measures.loss.key: belongs to `file`"),
        ("measures={loss: {metric: a, format: k}}", "measures.loss.format: 'k' formats no number"),
        (
            "measures={loss: {metric: a, of: middle}}",
            "measures.loss.of: 'middle' is no training here; known: low, high",
        ),
        ("plot.y=[los]", "plot.y: 'los' is no measure here; known: loss"),
        ("plot.x=degree", "plot.x: 'degree' is no axis or measure here; known: mixer, start, guidance, loss"),
        ("plot.lines=[loss]", "plot.lines: 'loss' is no axis here"),
        ("table=[fid]", "table: 'fid' is no measure here"),
        ("seeds=[1,1]", "seeds: one of them is there twice"),
        ("run=['sample {hig}']", "'hig' is no placeholder here; known: seed, folder, low, high, mixer"),
        ("run=['sample \"a']", "run: 'sample \"a': No closing quotation"),
        ("trainings.low.overrides=['init_from.path={high}']", "'high' is no training before it here; known: none"),
        ("axes.start.of=[hig]", "axes.start.of: 'hig' is no training here"),
        ("axes.low={values: [1]}", "axes: 'low' is already the name of something else"),
        ("axes.guidance.values=[1,1]", "axes.guidance.values: two of them are called '1'; give a table"),
        ("prepare=['data encode {low}']", "prepare: 'data encode {low}': is run once"),
        ('axes={"a b": {values: [1]}}', "axes: 'a b' is no name"),
        ("axis={}", "axis: unknown key; did you mean 'axes'?"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(tmp_path: Path, override: str, line: str) -> None:
    assert line in refused(write(tmp_path), override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("axes.guidance={field: model.degre, values: [1]}", "model.degre: unknown key; did you mean 'degree'?"),
        ("axes.guidance={field: model.depth, values: [-1]}", "model.depth: input should be greater than 0"),
        ("trainings.low.recipe=nowhere", "nowhere: no such recipe file"),
        (
            "trainings.low.recipe=experiment.yaml",
            "experiment.yaml: kind: trainings.low needs a recipe of kind train, and this one is experiment",
        ),
    ],
)
def test_a_wrong_training_is_one_line_that_names_the_point(tmp_path: Path, override: str, line: str) -> None:
    path = write(tmp_path)
    said = refused(path, override)
    assert line in said
    assert f"(experiment {path}: mixer-PoM.start-tuned.guidance-" in said


def test_values_that_differ_only_in_characters_of_no_folder_have_folders_of_their_own(tmp_path: Path) -> None:
    values = [-1, 1, "a b", "a_b", "a/b", [1, 2], "1;2", -0.5, 0.5]
    experiment = read_experiment(write(tmp_path), [f"axes.guidance.values={json.dumps(values)}"])
    names = [point.name for point in experiment.points]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * len(values)
    assert len({point.folder for point in experiment.points}) == len(names)
    assert {"mixer-PoM.start-tuned.guidance-1.seed-4", "mixer-PoM.start-tuned.guidance-a_b.seed-4"} <= set(names)
    PipelineRecipe.model_validate(pipeline(experiment))


def test_values_of_two_axes_whose_names_would_be_one_are_refused(tmp_path: Path) -> None:
    axes = 'axes={a: {values: ["1", "1.b-2"]}, b: {values: ["2.b-3", "3"]}}'
    said = refused(write(tmp_path), axes, 'run=["sample {high} --out {folder}/grid.png"]', "plot.x=a")
    assert "points would be called a-1.b-2.b-3.seed-4; name the values differently" in said


def test_another_kind_and_a_missing_small_version_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert "needs kind: experiment" in refused(tmp_path / "train.yaml")
    path.write_text(EXPERIMENT.split("small:", maxsplit=1)[0])
    assert "small: this experiment has no small version" in refused(path, small=True)


# --- the shipped ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_experiment_expands_with_three_seeds(path: Path, small: bool) -> None:
    experiment = shipped(path, small)
    assert len(experiment.recipe.seeds) == 3
    assert experiment.points
    assert len({point.name for point in experiment.points}) == len(experiment.points)


def test_degrees_are_compared_at_equal_state() -> None:
    """In multiples of dim; no whole expansion gives 12 at degree 5."""
    for small in (False, True):
        states: dict[str, Any] = {}
        for training in shipped(RECIPES / "experiments/table-2.yaml", small).trainings:
            mixer = training.recipe.model.mixers[0]
            states[training.name] = mixer.width(training.recipe.model.dim) / training.recipe.model.dim
        assert {state for name, state in states.items() if "degree-5" not in name or "coefficients" in name} == {12}
        assert {state for name, state in states.items() if "degree-5" in name} <= {10, 12}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_full_trainings_fit_one_node(path: Path) -> None:
    distinct = {str(one.recipe.model): one.recipe for one in shipped(path, False).trainings}
    for recipe in distinct.values():
        planned = plan(recipe, num_nodes=1, gpus_per_node=8, gpu="h100", utilization=0.4)
        assert planned.fits
        assert planned.speed.samples_per_s > 0


def test_the_example_of_the_docs_can_be_typed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "how-to" / "experiments.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("degrees.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    experiment = read_experiment("degrees.yaml")
    assert (len(experiment.trainings), len(experiment.points)) == (6, 12)


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_commands_parse(path: Path, small: bool) -> None:
    parser = _parser()
    experiment = shipped(path, small)
    commands = [words for point in experiment.points for words in point.commands]
    for words in [*map(shlex.split, experiment.recipe.prepare), *commands]:
        if words[0] == "-m":
            assert find_spec(words[1]), words
            continue
        parsed, rest = parser.parse_known_args(words)
        assert not unknown_words(parsed, rest), words
        if hasattr(parsed, "recipe"):
            load_recipe(parsed.recipe, [*parsed.overrides, *rest])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_full_measurements_say_how_pictures_are_drawn(path: Path) -> None:
    """A default of the training recipe, for pictures to look at, would decide the paper's table unseen."""
    parser = _parser()
    for point in shipped(path, False).points:
        for command in point.commands:
            if command[:2] == ["evaluate", "images"]:
                asked = parser.parse_args(command)
                assert (asked.num, asked.num_steps) == (50_000, 250)
                assert asked.guidance is not None
                assert asked.reference.startswith("data/")
                assert asked.json == point.folder / "images.json"
