"""The files of a run folder that are not metrics or checkpoints: recipe, code state, incarnations, outcome.

recipe.yaml            resolved recipe of the newest incarnation
code.json, code.diff   git commit and what differed from it
incarnations.jsonl     one line per start: when, where, from which sample, on how many ranks, which versions
bad_samples.jsonl      one line per sample that could not be read and was left out (data.bad_samples: skip)
outcome.json           how the newest incarnation ended; absent while it runs, or if it was killed
"""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pomscale
from pomscale.config.recipe import dump_recipe
from pomscale.config.schema import TrainRecipe
from pomscale.files import make_folder, write_text

BAD_SAMPLES = "bad_samples.jsonl"

_RECORDED_PACKAGES = ("torch", "numpy", "torchdata", "webdataset", "wandb", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Versions of pomscale, Python and the packages that numbers depend on."""
    found = {"pomscale": pomscale.__version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional extra that is not installed has no version to record
    return found


def num_incarnations(folder: Path) -> int:
    """How often this run has been started before."""
    path = folder / "incarnations.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def open_run_folder(folder: Path, recipe: TrainRecipe, *, start_samples: int, num_ranks: int) -> int:
    """Record the start of an incarnation; returns its number, 0 for the first. Called by rank 0 alone."""
    make_folder(folder)
    incarnation = num_incarnations(folder)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    code, diff = code_state()
    write_text(folder / "code.json", json.dumps(code, indent=1))
    write_text(folder / "code.diff", diff)
    (folder / "outcome.json").unlink(missing_ok=True)
    line = {
        "incarnation": incarnation,
        "started_unix_s": time.time(),
        "start_samples": start_samples,
        "num_ranks": num_ranks,
        "host": socket.gethostname(),
        "versions": versions(),
    }
    with (folder / "incarnations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return incarnation


def write_outcome(folder: Path, incarnation: int, state: str, *, samples: int | None = None, reason: str = "") -> None:
    """How an incarnation ended: "finished", "stopped" (on request, saved; run again to go on) or "failed" (reason)."""
    outcome = {"state": state, "incarnation": incarnation, "ended_unix_s": time.time()}
    if samples is not None:
        outcome["samples"] = samples
    if reason:
        outcome["reason"] = reason
    write_text(folder / "outcome.json", json.dumps(outcome, indent=1))


def is_finished(folder: Path) -> bool:
    """Whether the newest incarnation came to the end of its recipe, validation and all."""
    path = folder / "outcome.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["state"] == "finished"


def code_state() -> tuple[dict[str, Any], str]:
    """(commit and whether the tree differs from it, the difference). Without git: the version only."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, timeout=30)
        return done.stdout.decode(errors="replace")

    unknown = {"pomscale": pomscale.__version__, "git_commit": None}
    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root:  # installed inside somebody else's repository
            return unknown, ""
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", "*.py", "*.yaml")
        status = git("status", "--porcelain").splitlines()
    except (OSError, subprocess.SubprocessError):  # installed from a wheel, or git is not there
        return unknown, ""
    return {"pomscale": pomscale.__version__, "git_commit": commit, "dirty": bool(status), "changed": status}, diff
