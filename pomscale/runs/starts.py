"""Which start of a run is the newest: only that one may write.

    RUN/generations/000003     made by the third start of the run: host, process, time, SLURM job

A scheduler may take a node for dead and start the run again elsewhere while a rank of the start before lives on, behind
a network that was cut or a file system that hung. When it wakes up it must not commit, delete or overwrite anything.
So every start claims the next number, and whoever is about to write looks whether there is a higher one. No torch here.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pomscale.base.errors import PomscaleError

FOLDER = "generations"

_SAME_START_S = 2.0  # claims are written in whole seconds


class Superseded(PomscaleError):
    """A newer start of this run has taken over; nothing was written by this one since it noticed."""


@dataclass(frozen=True)
class Claim:
    """A start of a run, as its rank 0 has recorded it: a file of generations/.

    host None: it has the number already, and is about to say who it is; or what it said is torn.
    """

    number: int
    unix_s: float
    host: str | None = None
    pid: int | None = None
    slurm_job_id: str | None = None

    @property
    def lives(self) -> bool | None:
        """Whether its process is there; None where that cannot be seen from here."""
        if self.pid is None or self.host != socket.gethostname():
            return None
        return process_lives(self.pid, began_before_unix_s=self.unix_s + _SAME_START_S)

    def __str__(self) -> str:
        if self.host is None:
            return "just now"
        job = "" if self.slurm_job_id is None else f", SLURM job {self.slurm_job_id}"
        time = datetime.fromtimestamp(self.unix_s, UTC).isoformat(timespec="seconds")
        return f"{self.host}, process {self.pid}{job}, {time}"


class Generation:
    """One start of a run. Rank 0 claims it; the other ranks are told its number."""

    def __init__(self, run_folder: Path, number: int) -> None:
        self.number = number
        self._folder = run_folder / FOLDER

    @classmethod
    def claim(cls, run_folder: Path) -> Generation:
        """A number above all others of this run, which no other process has or will get. Called by rank 0 alone.

        Raises PomscaleError if the run folder cannot be written.
        """
        folder = run_folder / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                number = _newest(folder) + 1
                try:
                    # Exclusive: of two that start at once, one has the lower number, and will stop.
                    with (folder / f"{number:06d}").open("x", encoding="utf-8") as file:
                        json.dump(_this_process(), file)
                except FileExistsError:
                    continue
                return cls(run_folder, number)
        except OSError as error:
            raise PomscaleError(
                f"{folder}: this start of the run cannot be recorded: {error}; free some space or fix the file system"
            ) from error

    def check(self) -> None:
        """One look into a small folder, before every commit. Raises Superseded if this is not the newest start.

        Raises PomscaleError where that cannot be known.
        """
        try:
            newest = _newest(self._folder)
            newer = _read_claim(self._folder, newest) if newest > self.number else None
        except OSError as error:
            raise PomscaleError(
                f"{self._folder} cannot be read ({error}), so a newer start of this run may have taken over; "
                "fix the file system, then run the same command again"
            ) from error
        if newer is not None:
            raise Superseded(
                f"a newer start ({newer}) of this run has taken over {self._folder.parent}; "
                "this process stops without writing"
            )

    def other_alive(self) -> Claim | None:
        """The start before this one, if its process still lives on this machine: it is being taken over from."""
        if self.number == 1:
            return None
        claim = _read_claim(self._folder, self.number - 1)
        return claim if claim.lives else None


def newest_generation(run_folder: Path) -> int:
    """The number of the newest start of a run; 0 if there was none."""
    folder = run_folder / FOLDER
    return _newest(folder) if folder.is_dir() else 0


def newest_claim(run_folder: Path) -> Claim | None:
    """The newest start of a run; None if there was none."""
    number = newest_generation(run_folder)
    return _read_claim(run_folder / FOLDER, number) if number else None


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


def _read_claim(folder: Path, number: int) -> Claim:
    path = folder / f"{number:06d}"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        began = datetime.fromisoformat(said["time"]).timestamp()
        return Claim(number, began, said["host"], said["pid"], said["slurm_job_id"])
    except (OSError, KeyError, TypeError, ValueError):
        return Claim(number, path.stat().st_mtime)
