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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pomscale.errors import PomscaleError

FOLDER = "generations"


class Superseded(PomscaleError):
    """A newer start of this run has taken over; nothing was written by this one since it noticed."""


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
        except OSError as error:
            raise PomscaleError(
                f"{self._folder} cannot be read ({error}), so a newer start of this run may have taken over; "
                "fix the file system, then run the same command again"
            ) from error
        if newest > self.number:
            raise Superseded(
                f"a newer start ({_who(self._folder / f'{newest:06d}')}) of this run has taken over "
                f"{self._folder.parent}; this process stops without writing"
            )

    def other_alive(self) -> str | None:
        """Who the start before this one was, if its process still lives on this machine: it is being taken over from.

        Of other machines nobody knows, hence None.
        """
        path = self._folder / f"{self.number - 1:06d}"
        claim = _read_claim(path)
        if claim is None or claim["host"] != socket.gethostname():
            return None
        try:
            process = psutil.Process(claim["pid"])
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            # Or else the number has been given to another process since; the claim's time is rounded to a second.
            is_same = process.create_time() < datetime.fromisoformat(claim["time"]).timestamp() + 1
        except psutil.Error:
            return None
        return _who(path) if is_alive and is_same else None


def newest_generation(run_folder: Path) -> int:
    """The number of the newest start of a run; 0 if there was none."""
    folder = run_folder / FOLDER
    return _newest(folder) if folder.is_dir() else 0


def _newest(folder: Path) -> int:
    return max((int(name) for name in os.listdir(folder) if name.isdecimal()), default=0)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _read_claim(path: Path) -> dict[str, Any] | None:
    try:
        claim: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it has the number already, and is about to say who it is
        return None
    return claim


def _who(path: Path) -> str:
    claim = _read_claim(path)
    if claim is None:
        return "just now"
    job = "" if claim["slurm_job_id"] is None else f", SLURM job {claim['slurm_job_id']}"
    return f"{claim['host']}, process {claim['pid']}{job}, {claim['time']}"
