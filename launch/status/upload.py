"""Upload of one recording by the command `wandb sync`, and the meaning of what it prints and logs.

wandb itself is never imported here: the command of the same environment does the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pomscale.base.errors import PomscaleError
from pomscale.runs.wandb_id import WANDB_RUN_DELETED

_COMMAND = [sys.executable, "-m", "wandb", "sync"]
# Without this variable wandb takes every folder for the beginning of the run, and overwrites the data on the server.
_APPEND = {"WANDB_RESUME": "allow"}
_LOOK_EVERY_S = 0.5
_MAY_PASS = (408, 429)  # statuses between 400 and 499 that are no refusal: a time-out, too many requests


class NotLoggedIn(PomscaleError):
    """This machine is not logged in to wandb, so that every other run would be refused as well."""


class Unreadable(PomscaleError):
    """A log of wandb that was damaged by a kill or a full disk, so that nothing of it can be uploaded."""


class Deleted(PomscaleError):
    """The wandb run of the recording was deleted on the server, which refuses its id for good."""


def upload(folder: Path, show: Callable[[str], None]) -> None:
    """Upload a folder offline-run-TIME-ID. While its server cannot be reached, wandb waits and prints that.

    Raises PomscaleError, or one of the errors above, if the folder is not uploaded.
    """
    last, begun_s = "", time.time()
    refusals: list[str] = []
    with subprocess.Popen(
        [*_COMMAND, str(folder)],
        env=os.environ
        | _APPEND
        | {"WANDB_DIR": str(folder.parent.parent)},  # else its own logs are written to the working folder
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as command:
        threading.Thread(target=_end_if_refused, args=(command, folder, begun_s, refusals), daemon=True).start()
        assert command.stdout is not None
        for line in command.stdout:
            last = line.strip() or last
            show(f"  {line.rstrip()}")
    if refusals:
        error = Deleted if WANDB_RUN_DELETED in refusals[0] else PomscaleError
        raise error(f"{folder}: not uploaded, nor what comes after it: wandb's server refuses it: {refusals[0]}")
    if "api key" in last.lower() or "authenticated" in last.lower():
        raise NotLoggedIn(f"wandb: {last}; log in on this machine with `wandb login`, then run the same command again")
    if "Failed to read" in last:
        raise Unreadable(f"{folder}: left out: {last}; delete it, metrics.jsonl has the same data")
    if "ends with an incomplete record" in last:  # cut off by a kill: everything before the cut was uploaded
        for file in folder.glob("*.wandb"):
            _mark_of(file).touch()
    # The exit code is 0 even after a failure: only the mark shows success.
    if not is_synced(folder):
        raise PomscaleError(f"{folder}: not uploaded, nor what comes after it: {last}")


def is_synced(folder: Path) -> bool:
    """Whether a folder was uploaded."""
    return any(_mark_of(file).exists() for file in folder.glob("*.wandb"))


def _mark_of(file: Path) -> Path:
    """Return the file by which wandb marks a log that it has uploaded."""
    return file.with_name(f"{file.name}.synced")


def _end_if_refused(command: subprocess.Popen[str], folder: Path, begun_s: float, refusals: list[str]) -> None:
    """End the command once the server has refused the folder: wandb would ask again, silently, for hours."""
    while command.poll() is None:
        refusal = _find_refusal(folder, begun_s)
        if refusal is not None:
            refusals.append(refusal)
            command.kill()
            return
        time.sleep(_LOOK_EVERY_S)


def _find_refusal(folder: Path, begun_s: float) -> str | None:
    """Return the server's refusal in wandb's log of this upload."""
    for path in (folder.parent / "logs").glob("debug-sync.*.log"):
        if path.stat().st_mtime < begun_s - 1.0:  # of an upload before; clocks of file systems are coarse
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # it is just being written
                continue
            # Of a request that is tried again the status is a number, of others a text.
            status = entry.get("status")
            if folder.name in entry.get("sync_path", "") and _is_refusal(status):
                return f"HTTP {status}: {entry.get('body', '')}"
    return None


def _is_refusal(status: object) -> bool:
    return isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS
