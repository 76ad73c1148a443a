"""State of the code and of the packages that a run is started with, as the run folder and checkpoints record it."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pomscale
from pomscale.base import installation
from pomscale.runs.layout import CODE_DIFF_FILE, CODE_STATE_FILE

_RECORDED_PACKAGES = ("torch", "numpy", "torchdata", "webdataset", "wandb", "deepspeed", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of pomscale, Python and the packages that numbers depend on."""
    found = {"pomscale": pomscale.__version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional extra that is not installed has no version to record
    return found


def code_state() -> tuple[dict[str, Any], str]:
    """Return the git commit with whether the tree differs from it, and the difference; the version alone without git.

    A copy that `pomscale launch` has made records what it is a copy of; that is returned for it.
    """
    root = installation.root()
    if (root / CODE_STATE_FILE).is_file():
        state = (root / CODE_STATE_FILE).read_text(encoding="utf-8")
        return json.loads(state), (root / CODE_DIFF_FILE).read_text(encoding="utf-8")

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
