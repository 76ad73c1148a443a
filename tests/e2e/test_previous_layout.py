"""A run, a job and an encode that the commit before the move of all modules began are continued by the code of today.

The old code is taken out of git. A clone without its history cannot run these tests, and skips them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.encoding import contents
from support.paths import ROOT
from support.running import (
    ENVIRONMENT,
    GLOBAL_BATCH,
    assert_same_curve,
    controller_of,
    losses,
    outcome,
    pomscale,
    run,
    train,
    wait_until,
)

pytestmark = pytest.mark.slow

COMMIT = "b183dfea3df3efc2b4cc6a953afc9b828275d95f"  # the last one with flat modules
STOPPED_AT = 25 * GLOBAL_BATCH

# The command of then, which asks itself to stop at the step, or the part, of that number.
STOPPED_RUN = f"""
import os, signal
from pomscale.cli import main
from pomscale.trainer import Trainer

step = Trainer._step

def step_or_stop(trainer, clock):
    if clock.samples == {STOPPED_AT}:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(trainer, clock)

Trainer._step = step_or_stop
main()
"""
STOPPED_ENCODE = """
import itertools, os, signal, sys, time
from pathlib import Path
from data_pipelines.common.pipeline import Pipeline
from pomscale.cli import main

begin, numbers = Pipeline._begin, itertools.count(1)
parts = Path(sys.argv[-1].removeprefix("output=")) / "parts"

def begin_or_stop(*arguments):
    if next(numbers) == 4:
        while not list(parts.glob("part-*.json")):  # another thread writes them
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)
    return begin(*arguments)

Pipeline._begin = begin_or_stop
main()
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code of COMMIT."""
    folder = tmp_path_factory.mktemp("old")
    archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip(f"git does not have commit {COMMIT} here")
    subprocess.run(["tar", "-x"], input=archive.stdout, cwd=folder, check=True)
    return folder


def by_old(old: Path, *words: str | Path, code: str | None = None, expect: int = 0) -> None:
    """Run a command with the old code, from `code` where that is given."""
    start = ["-m", "pomscale"] if code is None else ["-c", code]
    run([sys.executable, *start, *map(str, words)], expect, env={**ENVIRONMENT, "PYTHONPATH": str(old)}, cwd=old)


@pytest.fixture
def reference(tiny_recipe: Path) -> Path:
    """The run folder of the same recipe, trained by today's code without a stop."""
    train(tiny_recipe, "name=reference")
    return tiny_recipe.parent / "runs" / "reference"


def test_a_run_is_resumed_reported_and_sampled(old: Path, tiny_recipe: Path, reference: Path, tmp_path: Path) -> None:
    folder = tiny_recipe.parent / "runs" / "tiny"
    by_old(old, "train", tiny_recipe, code=STOPPED_RUN, expect=75)
    assert outcome(folder)["samples"] == STOPPED_AT + GLOBAL_BATCH
    assert "resuming from" in train(tiny_recipe).stdout
    assert_same_curve(losses(folder), losses(reference))  # sums of mixers were rounded otherwise
    pomscale("report", folder)
    assert (folder / "report.html").is_file()
    pomscale("sample", folder, "--classes", "3", "--num", "2", "--steps", "2", "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    assert "tiny" in pomscale("runs", folder.parent).stdout


def test_a_job_is_resumed(old: Path, tiny_recipe: Path, reference: Path) -> None:
    """The job keeps the code that it was launched with, so its start after the resume is one of the old code."""
    folder, held = tiny_recipe.parent / "runs" / "tiny", tiny_recipe.parent / "held"
    held.write_text(str(STOPPED_AT))
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{old / 'tests' / 'unhurried'}{os.pathsep}{old}"}
    words = ["launch", str(tiny_recipe), "--cluster", "local", "faults.preflight=false"]
    run([sys.executable, "-m", "pomscale", *words], env={**environment, "UNHURRIED_HELD": str(held)}, cwd=old)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"train/loss"' in metrics.read_text())
    assert "running" in pomscale("runs", "status", folder).stdout
    pomscale("runs", "cancel", folder)
    assert outcome(folder)["state"] == "stopped"
    held.unlink()
    pomscale("runs", "resume", folder)
    wait_until(lambda: (outcome(folder) if (folder / "outcome.json").is_file() else {}).get("state") == "finished")
    wait_until(lambda: controller_of(folder) is None)
    assert_same_curve(losses(folder), losses(reference))  # sums of mixers were rounded otherwise
    assert "finished" in pomscale("runs", "status", folder).stdout


def test_an_encode_is_continued_to_the_same_bytes(old: Path, digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "encode.yaml"
    recipe.write_text(
        "kind: encode\nname: digits\ncodec: {name: pixel, block: 2, channels: 1}\ntransform: {size: 8}\n"
        f"source: {{kind: image_folder, path: {digits}/digits/heldout}}\nshard_samples: 100\n"
    )
    output, begun = tmp_path / "latents", tmp_path / "begun"
    by_old(old, "data", "encode", recipe, f"output={output}", code=STOPPED_ENCODE, expect=75)
    assert list((output / "parts").glob("part-*.json"))
    assert "were there" in pomscale("data", "encode", recipe, f"output={output}").stdout
    output.rename(begun)  # the manifest names the output
    pomscale("data", "encode", recipe, f"output={output}")
    assert contents(begun) == contents(output)
    assert json.loads((output / "manifest.json").read_text())["num_samples"] == 896
