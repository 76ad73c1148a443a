"""`pomscale runs sync`: upload what wandb has recorded offline, from a machine that has access to the internet.

Every start of a run leaves a folder RUN/wandb/offline-run-TIME-ID; all of them belong to one wandb run. They are
uploaded one after another, oldest first, each once: `wandb sync` marks what it has uploaded, and a folder that is still
being written waits. An upload that is interrupted is repeated; rows that it had sent are then on the server twice, at
the same samples.

wandb itself is never imported here: the command of the same environment does the work.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import ACTIVE
from pomscale.base.errors import PomscaleError
from pomscale.runs.layout import WANDB_FOLDER, WANDB_SYNC_LOCK_FILE

_COMMAND = [sys.executable, "-m", "wandb", "sync"]
# Without this variable wandb takes every folder for the beginning of the run, and overwrites the data on the server.
_APPEND = {"WANDB_RESUME": "allow"}
_STALE_S = 900.0

# A .wandb file is a LevelDB log: blocks of chunks (crc32, length, type, data); chunk 1 is a whole record, a protobuf
# message that begins with its number (field 1), followed by what it is: field 18 is the exit of the run.
_BLOCK, _CHUNK, _WHOLE, _FILE_HEADER = 32768, 7, 1, 7
_EXIT = re.compile(rb"\x08[\x80-\xff]*[\x00-\x7f]\x82\x01", re.DOTALL)


@dataclass(frozen=True)
class Synced:
    """Result of a sync. num_synced: folders that were uploaded. num_waiting: folders that are still being written."""

    num_synced: int
    num_waiting: int


class NotLoggedIn(PomscaleError):
    """This machine is not logged in to wandb, so that every other run would be refused as well."""


class _Unreadable(PomscaleError):
    """A log of wandb that was damaged by a kill or a full disk, so that nothing of it can be uploaded."""


def sync(job_folders: Mapping[Path, str], show: Callable[[str], None] = print) -> Synced:
    """Upload all folders of all runs that are ready, except for runs that another `sync` is uploading.

    If a folder fails, the later ones of its run wait, since they come after it on the server, unless the folder is
    damaged. Other runs are not affected. At the end a PomscaleError with wandb's own messages reports all failures.

    Args:
        job_folders: Names of runs by run folder.
        show: Called with each line for the user.
    """
    recorded = {job_folder: found for job_folder in job_folders if (found := _not_synced(job_folder))}
    states = {
        run.job_folder: run.state
        for run in summarize({job_folder: job_folders[job_folder] for job_folder in recorded}).runs
    }
    ready = {
        job_folder: [folder for folder in found if not _is_being_written(folder, found, states[job_folder])]
        for job_folder, found in recorded.items()
    }
    num_ready = sum(map(len, ready.values()))
    num_synced, problems = 0, []
    for job_folder, folders in ready.items():
        try:
            with _alone(job_folder) as alone:
                if not alone:
                    show(f"{job_folders[job_folder]}: another `runs sync` is uploading it")
                    continue
                for folder in folders:
                    if _is_synced(folder):
                        continue
                    show(f"{job_folders[job_folder]}: {folder.name} ({num_synced + 1} of {num_ready})")
                    try:
                        _upload(folder, show)
                        num_synced += 1
                    except _Unreadable as problem:
                        problems.append(str(problem))
        except NotLoggedIn:
            raise
        except PomscaleError as problem:
            problems.append(str(problem))
        except OSError as problem:  # another user's run
            problems.append(f"{job_folder}: left out: {problem}")
    if problems:
        raise PomscaleError("\n".join(problems))
    return Synced(num_synced, sum(map(len, recorded.values())) - num_ready)


def watch_and_sync(find: Callable[[], Mapping[Path, str]], minutes: float, show: Callable[[str], None] = print) -> None:
    """Sync again and again, without end. A server or a run folder that cannot be reached only causes a delay."""
    while True:
        try:
            synced = sync(find(), show)
            show(f"{time.strftime('%H:%M')}: {synced.num_synced} uploaded, {synced.num_waiting} still being written")
        except (PomscaleError, OSError) as problem:
            show(f"{time.strftime('%H:%M')}: {problem}; the next try is in {minutes:g} minutes")
        time.sleep(60 * minutes)


def _not_synced(job_folder: Path) -> list[Path]:
    """Return the folders that are not uploaded, oldest first: their names begin with the time."""
    folders = sorted((job_folder / WANDB_FOLDER).glob("offline-run-*"))
    return [folder for folder in folders if not _is_synced(folder) and _has_begun(folder)]


def _has_begun(folder: Path) -> bool:
    """Whether a log has more than its header, which is all that a start leaves if it is killed in its first seconds."""
    return any(file.stat().st_size > _FILE_HEADER for file in folder.glob("*.wandb"))


def _is_synced(folder: Path) -> bool:
    return any(_mark_of(file).exists() for file in folder.glob("*.wandb"))


def _mark_of(file: Path) -> Path:
    """Return the file by which wandb marks a log that it has uploaded."""
    return file.with_name(f"{file.name}.synced")


def _is_being_written(folder: Path, folders: list[Path], state: str) -> bool:
    """Whether a folder may still grow: only the newest, if it is not closed and its run is not over."""
    file = next(folder.glob("*.wandb"))
    if folder != folders[-1] or _is_closed(file):
        return False
    return state in ACTIVE or (state == "unknown" and time.time() - file.stat().st_mtime < _STALE_S)


def _is_closed(file: Path) -> bool:
    """Whether the last record is the exit of the run."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        at = max(0, size - 1) // _BLOCK * _BLOCK
        stream.seek(at)
        block = stream.read()
    offset, kind, record = _FILE_HEADER if at == 0 else 0, 0, b""
    while offset + _CHUNK <= len(block):
        _, length, kind = struct.unpack_from("<IHB", block, offset)
        record = block[offset + _CHUNK : offset + _CHUNK + length]
        offset += _CHUNK + length
    return kind == _WHOLE and _EXIT.match(record) is not None


@contextmanager
def _alone(job_folder: Path) -> Iterator[bool]:
    """Lock the upload of a run for the duration of the block. Yield False if another process has the lock."""
    with (job_folder / WANDB_SYNC_LOCK_FILE).open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _upload(folder: Path, show: Callable[[str], None]) -> None:
    """Upload a folder. While its server cannot be reached, wandb waits and prints that."""
    last = ""
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
        assert command.stdout is not None
        for line in command.stdout:
            last = line.strip() or last
            show(f"  {line.rstrip()}")
    if "api key" in last.lower() or "authenticated" in last.lower():
        raise NotLoggedIn(f"wandb: {last}; log in on this machine with `wandb login`, then run the same command again")
    if "Failed to read" in last:
        raise _Unreadable(f"{folder}: left out: {last}; delete it, metrics.jsonl has the same data")
    if "ends with an incomplete record" in last:  # cut off by a kill: everything before the cut was uploaded
        for file in folder.glob("*.wandb"):
            _mark_of(file).touch()
    # The exit code is 0 even after a failure: only the mark shows success.
    if not _is_synced(folder):
        raise PomscaleError(f"{folder}: not uploaded, nor what comes after it: {last}")
