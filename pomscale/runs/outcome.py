"""The files of a run folder that are not metrics or checkpoints: recipe, code state, incarnations, outcome.

recipe.yaml            resolved recipe of the newest incarnation
code.json, code.diff   git commit and what differed from it
incarnations.jsonl     one line per start: when, where, from which sample, on how many ranks, which versions
generations/           one file per start, by which a newer one takes over (distributed.generation)
bad_samples.jsonl      one line per sample that could not be read and was left out (data.bad_samples: skip)
outcome.json           how the newest incarnation ended; absent while it runs, or if it was killed
outcomes/              the same by rank, for every incarnation: of rank 0, and of those that failed
stacks/                what the threads of a rank that hung were doing
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
from pomscale.base import installation
from pomscale.base.files import make_folder, write_text
from pomscale.config.load import dump_recipe
from pomscale.config.train import TrainRecipe

BAD_SAMPLES = "bad_samples.jsonl"
CODE_STATE, CODE_DIFF = "code.json", "code.diff"

_RECORDED_PACKAGES = ("torch", "numpy", "torchdata", "webdataset", "wandb", "deepspeed", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Versions of pomscale, Python and the packages that numbers depend on."""
    found = {"pomscale": pomscale.__version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional extra that is not installed has no version to record
    return found


def open_run_folder(folder: Path, recipe: TrainRecipe, incarnation: int, *, start_samples: int, num_ranks: int) -> None:
    """Record the start of an incarnation. Called by rank 0 alone."""
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    code, diff = code_state()
    write_text(folder / CODE_STATE, json.dumps(code, indent=1))
    write_text(folder / CODE_DIFF, diff)
    (folder / "outcome.json").unlink(missing_ok=True)
    line = {
        "incarnation": incarnation,
        "started_unix_s": time.time(),
        "start_samples": start_samples,
        "num_ranks": num_ranks,
        "total_samples": recipe.training.total_samples,
        "host": socket.gethostname(),
        "versions": versions(),
    }
    with (folder / "incarnations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_outcome(
    folder: Path, incarnation: int, rank: int, state: str, *, samples: int | None = None, reason: str = ""
) -> None:
    """How an incarnation ended, as far as one rank knows. PomscaleError if it cannot be written.

    state: "finished"; "stopped" (on request, saved); "quit" (a second signal: at once, without a save); "hung"; or
    "failed" (reason). outcome.json is that of rank 0 where all went well, else of the first rank to tell: it has the
    cause, while the others mostly have lost their connection to it. An incarnation that has failed before its recipe
    was accepted finds that of the one before it.
    """
    outcome = {"state": state, "incarnation": incarnation, "rank": rank, "ended_unix_s": time.time()}
    if samples is not None:
        outcome["samples"] = samples
    if reason:
        outcome["reason"] = reason
    text = json.dumps(outcome, indent=1)
    make_folder(folder / "outcomes")
    write_text(folder / "outcomes" / f"{_incarnation_and_rank(incarnation, rank)}.json", text)
    newest = read_outcome(folder)
    if newest is None or newest["incarnation"] < incarnation:
        write_text(folder / "outcome.json", text)


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """outcome.json; None without it, and where it tells neither of which start nor how: as after a kill."""
    try:
        outcome = json.loads((folder / "outcome.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    told = isinstance(outcome, dict) and (type(outcome.get("incarnation")), type(outcome.get("state"))) == (int, str)
    return outcome if told else None


def outcomes_after(folder: Path, generation: int) -> dict[int, dict[str, Any]]:
    """By rank, of the newest incarnation after number `generation`; empty if there is none or it has left none.

    A rank that hung in foreign code, with Python's lock held, could leave nothing but its stacks: it counts as hung.
    """
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for path in (folder / "outcomes").glob("incarnation-*-rank-*.json"):
        incarnation, rank = _of_incarnation_and_rank(path)
        found.setdefault(incarnation, {})[rank] = json.loads(path.read_text(encoding="utf-8"))
    for path in (folder / "stacks").glob("incarnation-*-rank-*.txt"):
        incarnation, rank = _of_incarnation_and_rank(path)
        hung = {"state": "hung", "incarnation": incarnation, "rank": rank, "reason": f"stacks in {path}"}
        if path.stat().st_size:
            found.setdefault(incarnation, {}).setdefault(rank, hung | {"ended_unix_s": path.stat().st_mtime})
    newest = max(found, default=0)
    return found[newest] if newest > generation else {}


def _of_incarnation_and_rank(path: Path) -> tuple[int, int]:
    _, incarnation, _, rank = path.stem.split("-")
    return int(incarnation), int(rank)


def stacks_path(folder: Path, incarnation: int, rank: int) -> Path:
    """Where the stacks of a rank are written when it hangs."""
    return folder / "stacks" / f"{_incarnation_and_rank(incarnation, rank)}.txt"


def _incarnation_and_rank(incarnation: int, rank: int) -> str:
    return f"incarnation-{incarnation:04d}-rank-{rank:05d}"


def is_finished(folder: Path) -> bool:
    """Whether the newest incarnation came to the end of its recipe, validation and all."""
    outcome = read_outcome(folder)
    return outcome is not None and outcome["state"] == "finished"


def code_state() -> tuple[dict[str, Any], str]:
    """(commit and whether the tree differs from it, the difference). Without git: the version only."""
    root = installation.root()
    if (root / CODE_STATE).is_file():  # a copy that `pomscale launch` has made, and that says what it is a copy of
        state, diff = (root / CODE_STATE).read_text(encoding="utf-8"), (root / CODE_DIFF).read_text(encoding="utf-8")
        return json.loads(state), diff

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
