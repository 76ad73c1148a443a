"""`pomscale experiment` with real trainings: killed in the middle, it continues, and ends in a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from pomscale.runs.history import samples_seen
from support.running import NUM_STEPS, UNHURRIED, pomscale, started, wait_until

RECIPE = """
kind: experiment
name: degrees
output: {folder}/experiments
seeds: [0]
trainings:
  main: {{recipe: tiny.yaml, overrides: [checkpoint.every_samples=320, training.total_samples=640]}}
axes: {{degree: {{field: model.degree, values: [1, 2]}}}}
measures:
  loss: {{metric: train/loss}}
  parameters: {{plan: parameters}}
plot: {{x: degree, y: [loss]}}
"""


@pytest.fixture
def experiment(tiny_recipe: Path) -> Path:
    path = tiny_recipe.with_name("degrees.yaml")
    path.write_text(RECIPE.format(folder=tiny_recipe.parent))
    return path


def starts(run: Path) -> int:
    return len((run / "incarnations.jsonl").read_text().splitlines())


def test_killed_in_the_middle_it_continues_and_draws(experiment: Path) -> None:
    folder = experiment.parent / "experiments" / "degrees"
    first, second = (folder / "runs" / f"main.degree-{degree}.seed-0" for degree in (1, 2))
    command = [sys.executable, "-m", "pomscale", "experiment", str(experiment)]
    with started(command, env=UNHURRIED) as process:
        wait_until(lambda: 320 < samples_seen(second) < 32 * NUM_STEPS, "the second training does not begin")
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            one.kill()
    assert not (folder / "results.json").exists()
    table = pomscale("experiment", experiment).stdout
    assert starts(first) == 1, "what was done is not done again"
    assert starts(second) == 2
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["values"] for row in rows] == [{"degree": "1"}, {"degree": "2"}]
    assert all(row["measures"]["loss"]["mean"] > 0 for row in rows)
    assert "degree" in table
    assert (folder / "plot.png").stat().st_size > 1000
    pomscale("experiment", experiment)
    assert starts(second) == 2
    changed = pomscale(
        "experiment", experiment, "trainings.main.overrides=[training.total_samples=640,optimizer.lr=1]", expect=2
    )
    assert "this run was begun by another recipe (" in changed.stderr
    assert "optimizer.lr: 0.003 then, 1.0 now" in changed.stderr
