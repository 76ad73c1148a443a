"""What an experiment leaves: it runs what is not done, reads measures, and draws the table, the plot and the JSON."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.base.files import write_text
from pomscale.cli import main
from pomscale.experiments.draw import draw, markdown_row, plot, table
from pomscale.experiments.points import Experiment, read_experiment
from pomscale.experiments.results import Spread, collect
from pomscale.experiments.run import Stopped, run_experiment
from pomscale.experiments.steps import read_record

# json.tool copies a JSON file: a real command that starts in no time.
RECIPE = """
kind: experiment
name: copies
title: Copies of figures
output: {folder}/experiments
seeds: [0, 1, 2]
axes: {{size: {{values: [1, 4]}}, kind: {{values: [a, b]}}}}
run: ["-m json.tool {folder}/from/{{kind}}-{{size}}-{{seed}}.json {{folder}}/figures.json"]
measures:
  share: {{label: share right, file: figures.json, key: metrics.share, format: .1%}}
  second: {{file: figures.json, key: rows.1.s}}
plot: {{x: size, y: [share, second], log_x: true}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    for kind, base in (("a", 0.5), ("b", 0.25)):
        for size in (1, 4):
            for seed in range(3):
                figures = {"metrics": {"share": base + seed / 100}, "rows": [{}, {"s": size}], "what": "text"}
                (tmp_path / "from" / f"{kind}-{size}-{seed}.json").write_text(json.dumps(figures))
    path = tmp_path / "copies.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def run(recipe: Path, *overrides: str) -> Experiment:
    experiment = read_experiment(recipe, list(overrides))
    assert run_experiment(experiment).is_complete
    return experiment


def test_the_table_has_mean_and_spread_of_the_seeds(recipe: Path) -> None:
    experiment = run(recipe)
    results = collect(experiment)
    assert not results.missing
    assert results.rows[0].spreads["share"] == Spread(pytest.approx(0.51), pytest.approx(0.01), 0.5, 0.52, 3)
    lines = table(results).splitlines()
    assert lines[0] == "Copies of figures"
    assert lines[1].split("  ")[0] == "size"
    assert lines[2].split() == ["1", "a", "51.0%", "±", "1.0%", "1"]
    assert lines[5].split() == ["4", "b", "26.0%", "±", "1.0%", "4"]
    assert f"pomscale experiment {recipe}" in lines[6]
    assert markdown_row(results).startswith("| Copies of figures | share right: 1, a: 51.0% ± 1.0%; 1, b: 26.0%")
    titled = replace(results, recipe=results.recipe.model_copy(update={"title": "a|b"}))
    assert markdown_row(titled).startswith(r"| a\|b | share right"), "a bar in a cell ends none"


def test_the_plot_has_a_line_per_value_in_a_band_of_the_seeds(recipe: Path) -> None:
    panel = plot(collect(run(recipe))).axes[0]
    assert [line.get_label() for line in panel.get_lines()] == ["a", "b"]
    assert panel.get_lines()[1].get_xdata() == pytest.approx([1, 4])
    assert panel.get_lines()[1].get_ydata() == pytest.approx([0.26, 0.26])
    bands = [band for band in panel.collections if isinstance(band, PolyCollection)]
    heights = bands[1].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.25, 0.27))
    assert panel.get_xscale() == "log"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("size", "share right")


def test_plot_and_json_are_written_with_machine_versions_and_commit(recipe: Path) -> None:
    experiment = run(recipe)
    draw(experiment.folder, collect(experiment))
    with Image.open(experiment.folder / "plot.png") as picture:
        assert picture.width > picture.height > 300
    content = json.loads((experiment.folder / "results.json").read_text())
    assert {"commit", "cpu", "versions", "num_cpus", "command"} <= content.keys()
    assert len(content["points"]) == 12
    assert content["rows"][3]["measures"]["second"] == {"mean": 4, "std": 0, "least": 4, "greatest": 4, "num": 3}


def test_what_is_done_is_not_done_again_and_what_failed_is(recipe: Path, tmp_path: Path) -> None:
    source = tmp_path / "from" / "b-4-1.json"
    source.rename(tmp_path / "away")
    experiment = read_experiment(recipe)
    outcome = run_experiment(experiment)
    assert list(outcome.failed) == ["size-4.kind-b.seed-1"]
    results = collect(experiment)
    assert results.missing == ["size-4.kind-b.seed-1"]
    assert "(2)" in table(results)
    assert "1 of 12 points are missing: size-4.kind-b.seed-1" in table(results)
    write_text(tmp_path / "from" / "a-1-0.json", "{}")  # read again, it would change the result
    (tmp_path / "away").rename(source)
    assert run_experiment(experiment).is_complete
    assert collect(experiment).rows[0].spreads["share"].least == 0.5


def test_other_commands_are_run_again_in_an_empty_folder(recipe: Path) -> None:
    experiment = run(recipe)
    left = experiment.points[0].folder / "left"
    left.touch()
    again = read_experiment(
        recipe, [f"run=['-m json.tool --sort-keys {recipe.parent}/from/a-1-{{seed}}.json {{folder}}/figures.json']"]
    )
    assert run_experiment(again).is_complete
    assert not left.exists()
    record = read_record(again, again.points[0].name)
    assert record is not None
    assert "--sort-keys" in record.asked["commands"][0]


def test_one_step_alone(recipe: Path) -> None:
    experiment = read_experiment(recipe)
    assert run_experiment(experiment, only="size-4.kind-a.seed-2").is_complete
    assert len(collect(experiment).measured) == 1
    with pytest.raises(InputError, match="--only nothing: no step has this name"):
        run_experiment(experiment, only="nothing")


def test_what_is_done_so_far_can_be_drawn(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = read_experiment(recipe)
    for draws in (0, 1):
        with pytest.raises(SystemExit, match="0"):
            main(["experiment", str(recipe), "--draw"])
        assert f"{12 - draws} of 12 points are missing" in capsys.readouterr().out
        assert (experiment.folder / "plot.png").exists() == bool(draws)
        assert run_experiment(experiment, only="size-4.kind-a.seed-2").is_complete


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("metrics.shar", "has no 'metrics.shar'; did you mean 'share'?"),
        ("rows.7.s", "has no 'rows.7.s'; there are 0, 1"),
        ("what", "'what' is no number, but \"text\""),
    ],
)
def test_a_measure_that_is_not_there_is_one_line(recipe: Path, key: str, line: str) -> None:
    experiment = run(recipe, f"measures.share.key={key}")
    with pytest.raises(InputError) as raised:
        collect(experiment)
    assert str(raised.value).startswith("measures.share: ")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_no_command_leaves_is_one_line(recipe: Path) -> None:
    run(recipe)
    with pytest.raises(InputError, match=r"measures.share: .*other.json: cannot be read as JSON.*are to write it"):
        collect(read_experiment(recipe, ["measures.share.file=other.json"]))


def test_a_point_whose_commands_leave_no_file_has_failed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment", str(recipe), "seeds=[0]", "measures.share.file=other.json"]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    line = "failed: size-1.kind-a.seed-0: its commands ended well and left no other.json, which measures.share needs"
    assert line in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert line in capsys.readouterr().err, "tried again"


def test_failures_are_told_although_nothing_can_be_drawn(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "from" / "b-4-0.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["experiment", str(recipe), "seeds=[0]", "measures.share.key=nothing"])
    errors = capsys.readouterr().err
    assert "failed: size-4.kind-b.seed-0: exit code" in errors
    assert "has no 'nothing'" in errors


STOPPER = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getppid(), signal.SIGTERM)
open(sys.argv[1], "w").write('{"metrics": {"share": 1}, "rows": [0, {"s": 1}]}')
"""


def test_a_stop_counts_also_if_the_command_ends_well(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopper.py").write_text(STOPPER)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    experiment = read_experiment(recipe, ["run=['-m stopper {folder}/figures.json']"])
    with pytest.raises(Stopped, match="run the same command again"):
        run_experiment(experiment)
    assert len(collect(experiment).measured) == 1, "what was done counts, and nothing more was begun"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "size-1.kind-a.seed-0", "--draw"], "--only and --draw: give one of them"),
        (["--only", "size-1.kind-a.seed-0", "--cluster", "local"], "--only and --cluster: give one of them"),
        (["--only", "size-1.kind-a.seed-0", "--dry-run"], "--only and --dry-run: give one of them"),
        (["--draw", "--cluster", "local"], "--draw and --cluster: give one of them"),
        (["--draw", "--dry-run"], "--draw and --dry-run: give one of them"),
        (["--set", "account=a"], "--set: goes with --cluster"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    recipe: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["experiment", str(recipe), *words])
    assert line in capsys.readouterr().err


def test_a_figure_that_is_not_finite_is_shown_and_is_null_in_json(recipe: Path, tmp_path: Path) -> None:
    figures = {"metrics": {"share": math.nan}, "rows": [{}, {"s": 1}]}
    (tmp_path / "from" / "a-1-1.json").write_text(json.dumps(figures))
    experiment = run(recipe)
    assert "nan" in draw(experiment.folder, collect(experiment)).splitlines()[2]
    content = json.loads((experiment.folder / "results.json").read_text())
    assert content["rows"][0]["measures"]["share"]["mean"] is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("smple a --num 3", "`pomscale smple a --num 3` is no command: the verbs are train,"),
        ("evaluate images a --refrence b", "is no command: unrecognized arguments: --refrence"),
        ("sample a --steps many", "is no command: argument --steps/--num-steps: invalid positive value: 'many'"),
        ("-m json.tol a", "`python -m json.tol a` is no command: there is no module json.tol"),
        ("-m nothing.here", "is no command: there is no module nothing.here"),
        ("-m", "is no command: there is no module"),
    ],
)
@pytest.mark.parametrize("where", ["run", "prepare"])
@pytest.mark.parametrize("option", ["--dry-run", None])
def test_a_command_that_is_none_is_found_before_anything_is_run(
    recipe: Path, where: str, command: str, reason: str, option: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [word for word in ("experiment", str(recipe), option, f"{where}={json.dumps([command])}") if word]
    with pytest.raises(SystemExit, match="2"):
        main(changed)
    assert reason in capsys.readouterr().err
    assert not (recipe.parent / "experiments").exists()


def test_modules_of_the_working_folder_are_commands(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["experiment", str(recipe), "--dry-run", "run=['-m tools.mine {folder}']"])
