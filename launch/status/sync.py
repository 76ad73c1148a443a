"""`pomscale runs sync`: upload what wandb has recorded offline, from a machine that has access to the internet.

Every start of a run leaves a folder RUN/wandb/offline-run-TIME-ID; all of them belong to one wandb run. They are
uploaded one after another, oldest first, each once: `wandb sync` marks what it has uploaded, and a folder that is still
being written waits. An upload that is interrupted is repeated; rows that it had sent are then on the server twice, at
the same samples.

Recordings under an id that is no longer the run's own (see pomscale.runs.wandb_id) are left out, and said.
"""

from __future__ import annotations

import fcntl
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.status.runs import summarize
from launch.status.state import ACTIVE
from launch.status.upload import Deleted, NotLoggedIn, Unreadable, is_synced, upload
from pomscale.base.errors import PomscaleError
from pomscale.runs.layout import WANDB_FOLDER, WANDB_SYNC_LOCK_FILE
from pomscale.runs.wandb_id import left_wandb_ids, read_wandb_id, replace_wandb_id

_STALE_S = 900.0

# A .wandb file is a LevelDB log: blocks of chunks (crc32, length, type, data); chunk 1 is a whole record, a protobuf
# message that begins with its number (field 1), followed by what it is: field 18 is the exit of the run.
_BLOCK, _CHUNK, _WHOLE, _FILE_HEADER = 32768, 7, 1, 7
_EXIT = re.compile(rb"\x08[\x80-\xff]*[\x00-\x7f]\x82\x01", re.DOTALL)


_REMEDY = "`wandb sync --id NEW_ID FOLDER` uploads a recording as a run of its own"


@dataclass(frozen=True)
class Synced:
    """Result of a sync. num_synced: folders that were uploaded. num_waiting: folders that are still being written."""

    num_synced: int
    num_waiting: int


def sync(job_folders: Mapping[Path, str], show: Callable[[str], None] = print) -> Synced:
    """Upload all folders of all runs that are ready, except for runs that another `sync` is uploading.

    If a folder fails, the later ones of its run wait, since they come after it on the server, unless the folder is
    damaged. Other runs are not affected. At the end a PomscaleError with wandb's own messages reports all failures.

    Args:
        job_folders: Names of runs by run folder.
        show: Called with each line for the user.
    """
    uploads = _Uploads(job_folders, show)
    recorded = {job_folder: found for job_folder in job_folders if (found := uploads.to_do(job_folder))}
    states = {
        run.job_folder: run.state
        for run in summarize({job_folder: job_folders[job_folder] for job_folder in recorded}).runs
    }
    ready = {
        job_folder: [folder for folder in found if not _is_being_written(folder, found, states[job_folder])]
        for job_folder, found in recorded.items()
    }
    uploads.num_ready = sum(map(len, ready.values()))
    for job_folder, folders in ready.items():
        uploads.make(job_folder, folders)
    if uploads.problems:
        raise PomscaleError("\n".join(uploads.problems))
    return Synced(uploads.num_synced, sum(map(len, recorded.values())) - uploads.num_ready)


class _Uploads:
    """Uploads of one `sync`, with what failed of them."""

    def __init__(self, job_folders: Mapping[Path, str], show: Callable[[str], None]) -> None:
        self.num_ready = self.num_synced = 0
        self.problems: list[str] = []
        self._names = job_folders
        self._show = show

    def to_do(self, job_folder: Path) -> list[Path]:
        """Return the folders of a run that are not uploaded, oldest first: their names begin with the time."""
        folders = sorted((job_folder / WANDB_FOLDER).glob("offline-run-*"))
        found = [folder for folder in folders if not is_synced(folder) and _has_begun(folder)]
        try:
            left = left_wandb_ids(job_folder) if found else {}
        except (PomscaleError, OSError) as problem:
            self.problems.append(f"{job_folder}: left out: {problem}")
            return []
        for wandb_id, num in Counter(map(_id_of, found)).items():
            if wandb_id in left:
                name = self._names[job_folder]
                self._show(f"{name}: wandb run {wandb_id} left out ({num} recordings): {left[wandb_id]}; {_REMEDY}")
        return [folder for folder in found if _id_of(folder) not in left]

    def make(self, job_folder: Path, folders: list[Path]) -> None:
        """Upload folders of a run, up to one that fails."""
        try:
            with _alone(job_folder) as alone:
                if alone:
                    for folder in folders:
                        self._upload(job_folder, folder)
                else:
                    self._show(f"{self._names[job_folder]}: another `runs sync` is uploading it")
        except NotLoggedIn:
            raise
        except PomscaleError as problem:
            self.problems.append(str(problem))
        except OSError as problem:  # another user's run
            self.problems.append(f"{job_folder}: left out: {problem}")

    def _upload(self, job_folder: Path, folder: Path) -> None:
        if is_synced(folder):
            return
        self._show(f"{self._names[job_folder]}: {folder.name} ({self.num_synced + 1} of {self.num_ready})")
        try:
            upload(folder, self._show)
            self.num_synced += 1
        except Unreadable as problem:
            self.problems.append(str(problem))
        except Deleted as problem:
            if _id_of(folder) == read_wandb_id(job_folder):
                replace_wandb_id(job_folder, "it was deleted on wandb's server")
            raise PomscaleError(f"{problem}; {_REMEDY}") from problem


def watch_and_sync(find: Callable[[], Mapping[Path, str]], minutes: float, show: Callable[[str], None] = print) -> None:
    """Sync again and again, without end. A server or a run folder that cannot be reached only causes a delay."""
    while True:
        try:
            synced = sync(find(), show)
            show(f"{time.strftime('%H:%M')}: {synced.num_synced} uploaded, {synced.num_waiting} still being written")
        except (PomscaleError, OSError) as problem:
            show(f"{time.strftime('%H:%M')}: {problem}; the next try is in {minutes:g} minutes")
        time.sleep(60 * minutes)


def _id_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _has_begun(folder: Path) -> bool:
    """Whether a log has more than its header, which is all that a start leaves if it is killed in its first seconds."""
    return any(file.stat().st_size > _FILE_HEADER for file in folder.glob("*.wandb"))


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
