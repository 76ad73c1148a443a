"""Reference curves: what they are made of, their band, and the verdict on a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.cli import main
from pomscale.config.load import dump_recipe, load_train_recipe
from pomscale.config.shipped import shipped_references
from pomscale.monitoring.report.against import NUM_SPREADS, compare_with
from pomscale.monitoring.report.reference import (
    HELD_OUT,
    Curve,
    Reference,
    differences,
    find_reference,
    read_reference,
    reference_of,
    write_reference,
)
from pomscale.monitoring.sinks import JsonlSink
from pomscale.quickstart.curves import CHECKED, CHECKED_SEED, REFERENCES, SEEDS
from pomscale.runs.evaluation_log import record
from pomscale.runs.metric_names import evaluation_name
from support.paths import RECIPES

ACCURACY = evaluation_name("digits", "accuracy")
SAMPLES = list(range(1280, 12801, 1280))
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str, seed: int, *overrides: str, scale: float = 1.0, samples: Sequence[int] = SAMPLES) -> Path:
        """Make a run whose held-out loss falls, and differs between seeds by about 1 percent."""
        folder = tmp_path / name
        folder.mkdir()
        recipe = load_train_recipe(RECIPES / "quickstart.yaml", [f"name={name}", f"seed={seed}", *overrides])
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        noise = np.random.default_rng(seed).normal(0.0, 0.01, len(samples))
        sink = JsonlSink(folder, 0)
        for at, by in zip(samples, noise, strict=True):
            sink.log(at, {HELD_OUT: scale * (0.5 + 500.0 / at) * (1 + float(by)), "train/loss": 1.0})
        sink.close()
        return folder

    return make


@pytest.fixture
def three(make_run: MakeRun) -> list[Path]:
    return [make_run(f"seed-{seed}", seed) for seed in (0, 1, 2)]


def report(*words: object) -> int:
    """Run `pomscale report`, and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, words)])
    return int(ended.value.code or 0)


def test_mean_and_spread_are_those_of_one_more_run() -> None:
    curve = Curve([8, 16], [[1.0, 4.0], [2.0, 4.0], [3.0, 4.4]])
    assert curve.mean == pytest.approx([2.0, 12.4 / 3])
    own, factor = (1.0, np.std([4.0, 4.0, 4.4], ddof=1)), math.sqrt(4 / 3)
    pooled = math.sqrt(((own[0] / 2.0) ** 2 + (own[1] / (12.4 / 3)) ** 2) / 2)
    assert curve.spread == pytest.approx([factor * own[0], factor * pooled * 12.4 / 3]), "never less than all together"
    assert Curve([8], [[2.0], [2.0]]).spread == pytest.approx([math.sqrt(1.5) * 0.001 * 2.0]), "rounding"
    assert Curve([8], [[2.0]]).spread == pytest.approx([math.sqrt(2) * 0.01 * 2.0]), "one run has no spread"
    assert Curve([8], [[0.0], [0.0]]).spread == [0.0]


def test_the_band_holds_runs_like_those_it_is_made_of() -> None:
    """Of normally distributed runs with independent points almost none lie outside."""
    random, outside, num_trials = np.random.default_rng(0), 0, 400
    for _ in range(num_trials):
        values = 1.0 + 0.01 * random.standard_normal((4, 30))
        curve = Curve(list(range(30)), values[:3].tolist())
        distance = (values[3] - np.array(curve.mean)) / np.array(curve.spread)
        outside += int((np.abs(distance) > NUM_SPREADS).sum())
    assert outside / (num_trials * 30) < 1e-4


def test_a_reference_is_written_and_read_back(three: list[Path], tmp_path: Path) -> None:
    for number, run in enumerate(three):
        record(run, 12800, {ACCURACY: 0.9 + number / 100, evaluation_name("digits", "by_class_00"): 0.5})
    made = reference_of(three)
    assert (made.seeds, list(made.curves)) == ([0, 1, 2], [HELD_OUT, ACCURACY])
    assert made.curves[ACCURACY].values == [[0.9], [0.91], [0.92]]
    assert made.curves[ACCURACY].spread == pytest.approx([math.sqrt(4 / 3) * 0.02 * 0.91]), "samples vary, too"
    path = tmp_path / "new" / "small.json"
    path.parent.mkdir()
    write_reference(made, path)
    read = read_reference(path)
    assert read == Reference("small", made.recipe, made.seeds, made.versions, made.datasets, made.curves)
    assert find_reference([str(path)]) == read


def test_every_run_of_a_reference_is_inside(three: list[Path]) -> None:
    reference = reference_of(three)
    assert all(compare_with(run, reference).is_inside for run in three)


def test_a_run_that_leaves_is_told_where_and_by_how_much(
    three: list[Path], make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.json"
    assert report(*three, "--write-reference", path) == 0
    good, bad = make_run("good", 7), make_run("bad", 8)
    rows = [json.loads(line) for line in (bad / "metrics.jsonl").read_text().splitlines()]
    for row in rows[6:]:
        row[HELD_OUT] *= 1.5
    (bad / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert report(good, "--against", path) == 0
    assert f"{good} stays inside the band of small (seeds 0, 1, 2)" in capsys.readouterr().out
    with Image.open(good / "against.png") as picture:
        assert picture.size[0] == 1800
    assert report(good, bad, "--against", path, "--out", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert f"{bad} LEAVES the band of small" in out
    assert f"{HELD_OUT}: OUTSIDE from {SAMPLES[6]:,} samples on" in out
    assert "spreads above (4 of 10 points outside)" in out
    assert (tmp_path / "out" / "against.png").is_file()


def test_a_loss_that_is_not_finite_is_outside(three: list[Path], make_run: MakeRun) -> None:
    run = make_run("nan", 7, scale=math.nan)
    assert compare_with(run, reference_of(three)).metrics[0].first_outside == 0


def test_a_run_that_is_not_done_is_compared_as_far_as_it_is(three: list[Path], make_run: MakeRun) -> None:
    verdict = compare_with(make_run("young", 7, samples=SAMPLES[:3]), reference_of(three))
    assert verdict.is_inside
    assert "compared up to 3.84k samples" in verdict.words()


def test_a_run_of_another_recipe_is_refused_by_its_first_difference(three: list[Path], make_run: MakeRun) -> None:
    reference, run = reference_of(three), make_run("other", 7, "optimizer.lr=0.01", "model.mixer=attention")
    with pytest.raises(InputError, match=r"another recipe than .*: model.mixer: .*; --other-recipe"):
        compare_with(run, reference)
    notes = compare_with(run, reference, other_recipe=True).notes
    assert "optimizer.lr: 0.001 there, 0.01 here" in notes


def test_names_layout_and_cadence_are_not_the_recipe(three: list[Path], make_run: MakeRun) -> None:
    run = make_run(
        "elsewhere",
        9,
        "validation.every_samples=2560",
        "checkpoint.every_samples=1280",
        "compute.device=cpu",
        "data.path=/elsewhere",
        "training.micro_batch=8",
        "engine=deepspeed",
    )
    assert compare_with(run, reference_of(three)).notes == []


def test_figures_of_other_settings_are_not_compared(three: list[Path], make_run: MakeRun) -> None:
    for run in three:
        record(run, 12800, {ACCURACY: 0.9}, settings={"steps": 50})
    run = make_run("other", 7)
    record(run, 12800, {ACCURACY: 0.1}, settings={"steps": 5})
    verdict = compare_with(run, reference_of(three))
    assert verdict.is_inside
    assert f"{ACCURACY} is not compared: it was measured with other settings" in verdict.notes


def test_one_run_may_be_the_reference(three: list[Path], make_run: MakeRun) -> None:
    assert compare_with(three[1], find_reference([str(three[0])])).is_inside
    assert not compare_with(make_run("elsewhere", 7, scale=1.2), find_reference([str(three[0])])).is_inside


def test_what_is_no_reference_is_refused(three: list[Path], make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no curve file, no run folder, and not one of the shipped"):
        find_reference(["nothing"])
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"curves": {}}')
    with pytest.raises(InputError, match="not a file of `pomscale report --write-reference`"):
        read_reference(damaged)
    with pytest.raises(InputError, match="must differ in their seed, and these have 0, 0"):
        reference_of([three[0], make_run("again", 0)])
    with pytest.raises(InputError, match=r"runs of two recipes: optimizer.lr"):
        reference_of([three[0], make_run("other", 5, "optimizer.lr=0.01")])
    with pytest.raises(InputError, match="nothing to compare"):
        compare_with(make_run("elsewhere", 7, samples=[5]), reference_of(three))


@pytest.mark.parametrize(
    ("of_curve", "line"),
    [
        ({"values": [["0.5"], [0.5], [0.5]]}, "has values that are no finite numbers"),
        ({"values": [[None], [0.5], [0.5]]}, "has values that are no finite numbers"),
        ({"values": [[math.nan], [0.5], [0.5]]}, "has values that are no finite numbers"),
        ({"samples": ["1280"]}, "has values that are no finite numbers"),
        ({"values": [[0.5], [0.5]]}, "does not have a value per seed and samples"),
        ({"samples": [], "values": [[], [], []]}, "does not have a value per seed and samples"),
        (None, "has no curves; write it again"),
    ],
)
def test_a_damaged_curve_is_one_line(
    three: list[Path], tmp_path: Path, of_curve: dict[str, object] | None, line: str
) -> None:
    path = tmp_path / "mine.json"
    write_reference(reference_of(three), path)
    content = json.loads(path.read_text())
    curve = {"samples": [1280], "values": [[0.5], [0.5], [0.5]], "key": ""}
    content["curves"] = {} if of_curve is None else {HELD_OUT: curve | of_curve}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"mine.json: .*{line}"):
        read_reference(path)


def test_a_folder_that_is_no_run_is_one_line(three: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = "empty: no run folder: it has no recipe.yaml"
    with pytest.raises(InputError, match=line):
        find_reference([str(empty)])
    with pytest.raises(InputError, match=line):
        compare_with(empty, reference_of(three))


def test_a_reference_is_written_into_a_new_folder(three: list[Path], tmp_path: Path) -> None:
    assert report(*three, "--write-reference", tmp_path / "new" / "mine.json") == 0
    assert read_reference(tmp_path / "new" / "mine.json").seeds == [0, 1, 2]
    assert report(*three, "--write-reference", tmp_path / "new") == 2


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_all_reference_curves_are_shipped() -> None:
    assert set(shipped_references()) == set(REFERENCES)
    assert CHECKED in REFERENCES


@pytest.mark.parametrize("name", sorted(shipped_references()))
def test_shipped_curves_are_those_of_the_shipped_recipe(name: str) -> None:
    reference = read_reference(shipped_references()[name])
    made = REFERENCES[name]
    recipe = load_train_recipe(RECIPES / f"{made.recipe}.yaml", list(made.overrides))
    assert differences(reference.recipe, recipe) == [], "train them again: python -m pomscale.quickstart.curves --write"
    assert reference.seeds == list(SEEDS)
    assert CHECKED_SEED not in reference.seeds
    assert HELD_OUT in reference.curves
    assert any(metric.startswith(f"evaluation/{made.evaluation}/") for metric in reference.curves)
    assert set(reference.versions) >= {"pomscale", "torch", "python"}
    for metric, curve in reference.curves.items():
        distances = np.abs(np.array(curve.values) - curve.mean) / np.array(curve.spread)
        assert distances.max() < NUM_SPREADS, metric
    losses = np.array(reference.curves[HELD_OUT].mean)
    assert losses[-1] < 0.6 * losses[0]
