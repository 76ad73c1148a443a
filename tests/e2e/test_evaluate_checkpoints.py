"""`pomscale evaluate images RUN --every N --cluster local`: each checkpoint measured by a real job of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.node.evaluations import evaluation_folder
from launch.record.job import read_starts
from launch.record.result import final_verdict
from pomscale.base.errors import InputError
from pomscale.cli import _parser
from pomscale.runs.evaluation_log import read_evaluations
from pomscale.runs.layout import EVALUATED_FOLDER
from support.running import (
    GLOBAL_BATCH,
    UNHURRIED,
    controller_of,
    pomscale,
    standing_in,
    train,
    wait_until,
    write_tiny_recipe,
)

CHECKPOINTS = [GLOBAL_BATCH, 2 * GLOBAL_BATCH]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that has ended, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    samples = f"training.total_samples={CHECKPOINTS[-1]}"
    train(
        write_tiny_recipe(folder, digits),
        *(samples, "schedule={}", f"checkpoint.every_samples={CHECKPOINTS[0]}", "model.depth=1"),
    )
    return folder / "runs" / "tiny"


def words(run: Path, digits: Path, *more: str) -> list[str]:
    """Of a command that draws 16 pictures of `run`."""
    reference = str(digits / "latents" / "heldout")
    options = ["--extractor", "pixels", "--num-samples", "16", "--steps", "2", "--device", "cpu"]
    return ["evaluate", "images", str(run), "--reference", reference, *options, "--cluster", "local", *more]


def call(words: list[str]) -> int:
    """Run a command in this process, as pomscale.cli.main does."""
    parsed = _parser().parse_args(words)
    return int(parsed.run(parsed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--reference", "nowhere"], "nowhere: there is no such file or folder"),
        (["--extractor", "torchscript:nowhere.pt"], "nowhere.pt"),
        (["--metrics", "fdd"], "--metrics fdd: needs --extractor dinov2:FOLDER"),
        (["--weights", "halflife-7"], "has no weights 'halflife-7'"),
    ],
)
def test_what_every_job_would_end_with_is_said_before_any_is_submitted(
    run: Path, digits: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(words(run, digits, "--every", "32", *changes))
    with pytest.raises(InputError, match=message):
        call(words(run, digits, "--sweep", "guidance=0,1", "--work", str(tmp_path / "sweep"), *changes))
    assert not (run / "evaluations").exists()
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("average=ema,halflife-7", "has no weights 'halflife-7'"),
        ("sampler=heun,ddim,eta=0,0.5", "eta: heun adds no noise"),
        ("guidance=1,interval=0:1,0.9:0.1", "guidance_interval: 0.9 is not below 0.1"),
        ("classes=0,10", r"classes \[10\] are asked for, and the model has 0..9"),
    ],
)
def test_every_point_of_a_sweep_is_checked_before_any_is_submitted(
    run: Path, digits: Path, tmp_path: Path, sweep: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(words(run, digits, "--sweep", sweep, "--work", str(tmp_path / "sweep")))
    assert not (tmp_path / "sweep").exists()


def test_a_run_without_a_checkpoint_is_checked_for_the_rest(run: Path, digits: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(run / "recipe.yaml", fresh)
    with pytest.raises(InputError, match="nowhere: there is no such file or folder"):
        call(words(fresh, digits, "--every", "32", "--reference", "nowhere"))
    assert call(words(fresh, digits, "--every", "32")) == 0


def test_every_checkpoint_is_measured_by_a_job_of_its_own(
    run: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [evaluation_folder(run, "images", samples) for samples in CHECKPOINTS]
    command = words(run, digits, "--every", str(CHECKPOINTS[0]), "--metrics", "fid,kid")
    done = pomscale(*command, env={**UNHURRIED, **standing_in()})
    assert [line.split(": job ")[0] for line in done.stdout.splitlines() if ": job " in line] == [
        folder.name for folder in folders
    ]
    wait_until(lambda: all(final_verdict(folder) is not None for folder in folders), lambda: told(folders))
    wait_until(lambda: all(controller_of(folder) is None for folder in folders), "a controller does not end")
    first, second = (read_starts(folder)[-1] for folder in folders)
    assert first.verdict is not None
    assert second.verdict is not None
    assert (first.verdict.exit_code, second.verdict.exit_code) == (0, 0), told(folders)
    assert second.record.started_unix_s >= first.verdict.decided_unix_s, "one machine does one after another"

    found = {one.samples: one for one in read_evaluations(run)}
    assert sorted(found) == CHECKPOINTS
    for samples, folder in zip(CHECKPOINTS, folders, strict=True):
        figures = json.loads((folder / "figures.json").read_text())
        assert set(figures["metrics"]) == {"fid", "kid"}
        assert figures["settings"]["checkpoint"]["samples"] == samples
        assert figures["settings"]["drawn"]["number"] == 16
        assert found[samples].metrics == {
            f"evaluation/images/{name}": value for name, value in figures["metrics"].items()
        }
        assert found[samples].settings == figures["settings"]
        assert not (folder / EVALUATED_FOLDER).exists(), "the files of the checkpoint are let go"
    assert found[CHECKPOINTS[0]].metrics != found[CHECKPOINTS[1]].metrics

    assert call(command) == 0
    assert "nothing is left to submit" in capsys.readouterr().out


def told(folders: list[Path]) -> str:
    return "\n".join(path.read_text()[-2000:] for folder in folders for path in folder.glob("logs/*.log"))
