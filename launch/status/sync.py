"""`pomscale runs sync`: what wandb has recorded offline -> its server, from a machine that has the internet.

Every start of a run leaves a folder RUN/wandb/offline-run-TIME-ID, all of one wandb run. They are uploaded one after
the other, oldest first, each once: `wandb sync` marks what it has uploaded, and what is still being written waits. Only
an upload that is interrupted is begun anew; what it had sent is then there twice, at the same samples.

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
# Without it wandb takes every folder for the beginning of the run, and overwrites on the server what is there.
_APPEND = {"WANDB_RESUME": "allow"}
_STALE_S = 900.0

# A .wandb file is a LevelDB log: blocks of chunks (crc32, length, type, data); chunk 1 is a whole record, a protobuf
# message that begins with its number (field 1), followed by what it is: field 18 is the exit of the run.
_BLOCK, _CHUNK, _WHOLE, _FILE_HEADER = 32768, 7, 1, 7
_EXIT = re.compile(rb"\x08[\x80-\xff]*[\x00-\x7f]\x82\x01", re.DOTALL)


@dataclass(frozen=True)
class Synced:
    """num_synced, num_waiting: folders that were uploaded, and that are still being written."""

    num_synced: int
    num_waiting: int


class NotLoggedIn(PomscaleError):
    """wandb would refuse every other run as well."""


class _Unreadable(PomscaleError):
    """A log of wandb's that a kill or a full disk has torn; nothing of it was uploaded, and nothing ever will be."""


def sync(homes: Mapping[Path, str], show: Callable[[str], None] = print) -> Synced:
    """All that is ready, of all runs; what another `sync` has in hand is left to it.

    A folder that fails holds up the later ones of its run, for they come after it on the server, unless there is
    nothing in it to be had. Other runs go on. PomscaleError at the end, with wandb's own words, where that happened.
    """
    recorded = {home: found for home in homes if (found := _not_synced(home))}
    states = {run.home: run.state for run in summarize({home: homes[home] for home in recorded}).runs}
    ready = {
        home: [folder for folder in found if not _is_being_written(folder, found, states[home])]
        for home, found in recorded.items()
    }
    num_ready = sum(map(len, ready.values()))
    num_synced, problems = 0, []
    for home, folders in ready.items():
        try:
            with _alone(home) as alone:
                if not alone:
                    show(f"{homes[home]}: another `runs sync` is at it")
                    continue
                for folder in folders:
                    if _is_synced(folder):
                        continue
                    show(f"{homes[home]}: {folder.name} ({num_synced + 1} of {num_ready})")
                    try:
                        _upload(folder, show)
                        num_synced += 1
                    except _Unreadable as problem:
                        problems.append(str(problem))
        except NotLoggedIn:
            raise
        except PomscaleError as problem:
            problems.append(str(problem))
        except OSError as problem:  # somebody else's run
            problems.append(f"{home}: left out: {problem}")
    if problems:
        raise PomscaleError("\n".join(problems))
    return Synced(num_synced, sum(map(len, recorded.values())) - num_ready)


def watch_and_sync(find: Callable[[], Mapping[Path, str]], minutes: float, show: Callable[[str], None] = print) -> None:
    """For ever: a server that is away, or a run folder that is, only delays it."""
    while True:
        try:
            synced = sync(find(), show)
            show(f"{time.strftime('%H:%M')}: {synced.num_synced} uploaded, {synced.num_waiting} still being written")
        except (PomscaleError, OSError) as problem:
            show(f"{time.strftime('%H:%M')}: {problem}; the next try is in {minutes:g} minutes")
        time.sleep(60 * minutes)


def _not_synced(home: Path) -> list[Path]:
    """Oldest first: their names begin with the time."""
    folders = sorted((home / WANDB_FOLDER).glob("offline-run-*"))
    return [folder for folder in folders if not _is_synced(folder) and _has_begun(folder)]


def _has_begun(folder: Path) -> bool:
    """One that was killed in its first seconds has left nothing but the header of its log."""
    return any(file.stat().st_size > _FILE_HEADER for file in folder.glob("*.wandb"))


def _is_synced(folder: Path) -> bool:
    return any(_mark_of(file).exists() for file in folder.glob("*.wandb"))


def _mark_of(file: Path) -> Path:
    """wandb makes it, and leaves out what has one."""
    return file.with_name(f"{file.name}.synced")


def _is_being_written(folder: Path, of_run: list[Path], state: str) -> bool:
    """Only the newest can be. One that was killed was never closed: it counts once its run is over."""
    file = next(folder.glob("*.wandb"))
    if folder != of_run[-1] or _is_closed(file):
        return False
    return state in ACTIVE or (state == "unknown" and time.time() - file.stat().st_mtime < _STALE_S)


def _is_closed(file: Path) -> bool:
    """Whether the last record is the exit of the run."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        at = max(0, size - 1) // _BLOCK * _BLOCK
        stream.seek(at)
        block = stream.read()
    place, kind, record = _FILE_HEADER if at == 0 else 0, 0, b""
    while place + _CHUNK <= len(block):
        _, length, kind = struct.unpack_from("<IHB", block, place)
        record = block[place + _CHUNK : place + _CHUNK + length]
        place += _CHUNK + length
    return kind == _WHOLE and _EXIT.match(record) is not None


@contextmanager
def _alone(home: Path) -> Iterator[bool]:
    """Whether no other process is uploading this run; none will until the block ends."""
    with (home / WANDB_SYNC_LOCK_FILE).open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _upload(folder: Path, show: Callable[[str], None]) -> None:
    """wandb waits, and says so, while its server is away."""
    last = ""
    with subprocess.Popen(
        [*_COMMAND, str(folder)],
        env=os.environ | _APPEND | {"WANDB_DIR": str(folder.parent.parent)},  # or its own logs lie where one is
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
        raise _Unreadable(f"{folder}: left out: {last}; delete it, metrics.jsonl has all of it")
    if "ends with an incomplete record" in last:  # cut off by a kill: all of it that there is was uploaded
        for file in folder.glob("*.wandb"):
            _mark_of(file).touch()
    # Its exit code is 0 also where something has failed: only its mark tells.
    if not _is_synced(folder):
        raise PomscaleError(f"{folder}: not uploaded, nor what comes after it: {last}")
