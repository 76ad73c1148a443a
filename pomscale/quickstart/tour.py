"""Shared part of the quickstarts: they run the usual commands, and print each before it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pomscale.runs.layout import METRICS_FILE

# One thread per process: on two cores, two processes with two spinning threads each are many times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def section(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(*arguments: str) -> None:
    """Run Python with these arguments, as a user would; a failure ends the tour with the command's own message."""
    print(f"$ python {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, check=False)
    if done.returncode != 0:
        sys.exit(f"quickstart stopped: the command above failed with exit code {done.returncode}")


def pomscale(*arguments: str) -> None:
    run("-m", "pomscale", *arguments)


def train_command(recipe: str, folder: Path, *overrides: str) -> list[str]:
    """Return the words that train on two processes, into runs/NAME."""
    return [*_TORCHRUN, "-m", "pomscale", "train", recipe, f"name={folder.name}", *overrides]


def remove_earlier(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            print(f"removing {folder} of an earlier tour")
            shutil.rmtree(folder)


def read_figures(run_folder: Path, evaluation: str) -> dict[str, Any]:
    """Return the last value of every metric of a run, and the figures of RUN_FOLDER/EVALUATION.json."""
    figures: dict[str, Any] = json.loads((run_folder / f"{evaluation}.json").read_text(encoding="utf-8"))
    for line in (run_folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        figures.update(json.loads(line))
    return figures
