"""Starts of a run: the number that each one claims, by which only the newest may write, and what each one records.

    RUN/generations/000003     claim of the third start of the run: host, process, time, SLURM job

A scheduler may take a node for dead and start the run again elsewhere while a rank of the start before lives on, behind
a network that was cut or a file system that hung. When it wakes up it must not commit, delete or overwrite anything.
So every start claims the next number, and looks for a higher one before it writes. This module needs no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pomscale.base.errors import PomscaleError
from pomscale.base.files import write_text
from pomscale.config.load import dump_recipe
from pomscale.config.train import TrainRecipe
from pomscale.runs.code_state import code_state, versions
from pomscale.runs.layout import (
    CLAIMS_FOLDER,
    CODE_DIFF_FILE,
    CODE_STATE_FILE,
    OUTCOME_FILE,
    RECIPE_FILE,
    STARTS_FILE,
    claim_path,
)
from pomscale.runs.original import original_of

_SAME_START_S = 2.0  # claims are written in whole seconds


class Superseded(PomscaleError):
    """A newer start of this run has taken over; this start has written nothing since it noticed."""


@dataclass(frozen=True)
class Claim:
    """The record that rank 0 of a start has left of itself: a file of generations/.

    host is None where the number is claimed but the file is still empty, or torn. original: the run folder that the
    claim belongs to, where this one is a copy of it.
    """

    number: int
    unix_s: float
    host: str | None = None
    pid: int | None = None
    slurm_job_id: str | None = None
    original: Path | None = None

    @property
    def lives(self) -> bool | None:
        """Whether the process of this start lives and works here; None where that cannot be seen from this host."""
        if self.original is not None:
            return False
        if self.pid is None or self.host != socket.gethostname():
            return None
        return process_lives(self.pid, began_before_unix_s=self.unix_s + _SAME_START_S)

    def __str__(self) -> str:
        if self.host is None:
            return "just now"
        job = "" if self.slurm_job_id is None else f", SLURM job {self.slurm_job_id}"
        claimed = datetime.fromtimestamp(self.unix_s, UTC).isoformat(timespec="seconds")
        return f"{self.host}, process {self.pid}{job}, {claimed}"


class Start:
    """One start of a run. Rank 0 claims its number, which the other ranks then receive."""

    def __init__(self, run_folder: Path, number: int) -> None:
        self.number = number
        self._run_folder = run_folder

    @classmethod
    def claim(cls, run_folder: Path) -> Start:
        """Claim a number above all others of this run, which no other process has or will get. Called by rank 0 alone.

        Raises PomscaleError if the run folder cannot be written.
        """
        folder = run_folder / CLAIMS_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                number = _newest(folder) + 1
                try:
                    # Exclusive: of two that start at once, one has the lower number, and will stop.
                    with claim_path(run_folder, number).open("x", encoding="utf-8") as file:
                        json.dump(_this_process() | {"folder": str(run_folder.absolute())}, file)
                except FileExistsError:
                    continue
                return cls(run_folder, number)
        except OSError as error:
            raise PomscaleError(
                f"{folder}: this start of the run cannot be recorded: {error}; free some space or fix the file system"
            ) from error

    def check(self) -> None:
        """Raise Superseded if this is not the newest start; called before every commit.

        Costs one look into a small folder. Raises PomscaleError where the newest start cannot be known.
        """
        folder = self._run_folder / CLAIMS_FOLDER
        try:
            newest = _newest(folder)
            newer = _read_claim(self._run_folder, newest) if newest > self.number else None
        except OSError as error:
            raise PomscaleError(
                f"{folder} cannot be read ({error}), so a newer start of this run may have taken over; "
                "fix the file system, then run the same command again"
            ) from error
        if newer is not None:
            raise Superseded(
                f"a newer start ({newer}) of this run has taken over {self._run_folder}; "
                "this process stops without writing"
            )

    def other_alive(self) -> Claim | None:
        """Return the claim of the start before this one if its process still lives on this machine, else None."""
        if self.number == 1:
            return None
        claim = _read_claim(self._run_folder, self.number - 1)
        return claim if claim.lives else None


def record_start(run_folder: Path, recipe: TrainRecipe, start: int, *, start_samples: int, num_ranks: int) -> None:
    """Record a start in the run folder: recipe, state of the code, and a line of incarnations.jsonl.

    Called by rank 0 alone. The outcome of the start before it is removed.
    """
    write_text(run_folder / RECIPE_FILE, dump_recipe(recipe))
    code, diff = code_state()
    write_text(run_folder / CODE_STATE_FILE, json.dumps(code, indent=1))
    write_text(run_folder / CODE_DIFF_FILE, diff)
    (run_folder / OUTCOME_FILE).unlink(missing_ok=True)
    line = {
        "incarnation": start,
        "started_unix_s": time.time(),
        "start_samples": start_samples,
        "num_ranks": num_ranks,
        "total_samples": recipe.training.total_samples,
        "host": socket.gethostname(),
        "versions": versions(),
    }
    with (run_folder / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def newest_start(run_folder: Path) -> int:
    """Return the number of the newest start of a run; 0 if there was none."""
    folder = run_folder / CLAIMS_FOLDER
    return _newest(folder) if folder.is_dir() else 0


def newest_claim(run_folder: Path) -> Claim | None:
    """Return the claim of the newest start of a run; None if there was none."""
    number = newest_start(run_folder)
    return _read_claim(run_folder, number) if number else None


def process_lives(pid: int, *, began_before_unix_s: float) -> bool:
    """Whether a process of this host lives; one that began later has only got the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= began_before_unix_s
    except psutil.NoSuchProcess:
        return False


def _newest(folder: Path) -> int:
    return max((int(name) for name in os.listdir(folder) if name.isdecimal()), default=0)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _read_claim(run_folder: Path, number: int) -> Claim:
    path = claim_path(run_folder, number)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        began = datetime.fromisoformat(said["time"]).timestamp()
        original = original_of(run_folder, said.get("folder"), lambda other: _holds(other, number, path))
        return Claim(number, began, said["host"], said["pid"], said["slurm_job_id"], original)
    except (OSError, KeyError, TypeError, ValueError):
        return Claim(number, path.stat().st_mtime)


def _holds(run_folder: Path, number: int, claim: Path) -> bool:
    """Whether a run folder has the same claim of this number."""
    other = claim_path(run_folder, number)
    return other.is_file() and other.read_bytes() == claim.read_bytes()
