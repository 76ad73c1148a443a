"""Real processes that measure together, and one that is killed: the last digits of the figures stay."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.forking import ENVIRONMENT
from support.generated_clips import make_clips, save_i3d, write_clip_folder
from support.generated_pictures import make_pixels, write_folder
from support.running import TIMEOUT_S, pomscale, run, started
from support.tiny_films import save_model, save_picture_model

NUM_PICTURES = 64

# An evaluation that kills itself when its fourth part is about to be recorded.
KILLED = """
import os, signal, sys
from pomscale.cli import main
from pomscale.evaluation.generated.work_folder import PartFiles
commit, parts = PartFiles.commit, []
def commit_three(self, part, *arguments):
    parts.append(part)
    if len(parts) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, part, *arguments)
PartFiles.commit = commit_three
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    save_picture_model(folder / "model")
    write_folder(folder / "reference", make_pixels(50))
    return folder


def words(folder: Path, name: str) -> list[str]:
    """A command that draws 64 pictures in parts of 8, and measures them and the 50 of the reference."""
    work = folder / name
    return [
        *("evaluate", "images", str(folder / "model"), "--reference", str(folder / "reference")),
        *(
            "--extractor",
            "pixels",
            "--num-samples",
            str(NUM_PICTURES),
            "--part",
            "8",
            "--batch",
            "4",
            "--device",
            "cpu",
        ),
        *("--steps", "2", "--guidance", "1.5", "--labels", "random", "--work", str(work)),
        *("--write-npz", str(work) + ".npz", "--json", str(work) + ".json"),
    ]


def outcome(folder: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """The result without the paths, and the pictures."""
    result = json.loads((folder / f"{name}.json").read_text())
    return result, (folder / f"{name}.npz").read_bytes()


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What one process gives."""
    done = pomscale(*words(folder, "alone"))
    assert "fid" in done.stdout
    return outcome(folder, "alone")


def run_together(commands: Sequence[list[str]]) -> list[str]:
    """Run commands at the same time; return what each has printed."""
    with ExitStack() as stack:
        options = {"env": ENVIRONMENT}
        processes = [
            stack.enter_context(started([sys.executable, "-m", "pomscale", *command], **options))
            for command in commands
        ]
        printed = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


@pytest.mark.parametrize("num_tasks", [pytest.param(2, marks=pytest.mark.exhaustive), 3])  # two ranks are below
def test_tasks_give_the_figures_of_one_process(
    folder: Path, alone: tuple[dict[str, Any], bytes], num_tasks: int
) -> None:
    name = f"tasks-{num_tasks}"
    tasks = [[*words(folder, name), "--task", f"{number}/{num_tasks}"] for number in range(num_tasks)]
    printed = run_together(tasks)
    assert any("fid" in text for text in printed)
    assert outcome(folder, name) == alone


def test_ranks_of_torchrun_give_the_figures_of_one_process(folder: Path, alone: tuple[dict[str, Any], bytes]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pomscale"]
    done = run([*launcher, *words(folder, "ranks")])
    assert outcome(folder, "ranks") == alone
    lines = [line for line in done.stderr.splitlines() if line.startswith("pictures: ")]
    assert 1 <= len(lines) <= 2, "the first rank speaks for both, in the beginning and in the end"


def test_a_killed_evaluation_continues(folder: Path, alone: tuple[dict[str, Any], bytes]) -> None:
    command = words(folder, "killed")
    run([sys.executable, "-c", KILLED, *command], expect=-9)
    assert len(list((folder / "killed" / "parts").glob("*.json"))) == 3
    assert not (folder / "killed.json").exists()
    done = pomscale(*command)
    assert f"{NUM_PICTURES + 50} of {NUM_PICTURES + 50}" in done.stderr
    assert outcome(folder, "killed") == alone
    assert not list((folder / "killed").rglob("*.tmp"))


def test_processes_give_the_figures_of_one_for_clips(tmp_path: Path) -> None:
    save_model(tmp_path, sampling={"prompts": ["red", "blue"]})
    save_i3d(tmp_path / "i3d.pt")
    write_clip_folder(tmp_path / "reference", make_clips(9))

    def command(name: str) -> list[str]:
        return [
            *("evaluate", "images", str(tmp_path / "model"), "--reference", str(tmp_path / "reference")),
            *("--extractor", f"torchscript:{tmp_path / 'i3d.pt'}", "--measured-frames", "3", "--num-samples", "10"),
            *("--part", "3", "--batch", "2", "--steps", "1", "--device", "cpu", "--work", str(tmp_path / name)),
        ]

    def result(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / name / "result.json").read_text())
        return found

    pomscale(*command("alone"))
    assert result("alone")["metrics"]["fvd"] > 0
    run_together([[*command("tasks"), "--task", f"{number}/3"] for number in range(3)])
    assert result("tasks") == result("alone")
