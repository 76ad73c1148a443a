"""The space that a cache folder may take: locks, the number of bytes taken, and the eviction of shards.

The number of bytes taken is kept in room.lock, since a look at 20,000 files takes a second. It is never too low for
long: each process counts the files once when it opens the cache and again when it would pass the limit, and files that
others delete are not subtracted. Where room.lock has no number, the next process counts.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pomscale.base.errors import InputError, PomscaleError

LOCK = ".lock"
INDEX = ".npy"
_TEMPORARY = ".tmp"
_ROOM = f"room{LOCK}"

# Other files in the folder that the user named are neither counted nor deleted.
NUM_DIGITS = 16
_DATASET_FOLDERS = NUM_DIGITS * "[0-9a-f]"

# Interval of the checks while a lock, or all of the space, belongs to others that are fetching.
POLL_S = 0.05

# Beyond what is needed, idle shards of one part in so many of the limit are evicted, so that a full cache is counted
# once for many shards, and not for each.
_SPARE = 64

_TOTAL = b"%020d"  # of one length, so that it is overwritten in place also where the disk is full


class Room:
    """Space of `limit` bytes in the folder `root`, for all datasets in it."""

    def __init__(self, root: Path, limit: int) -> None:
        self._root = root
        self._limit = limit
        self._has_counted = False

    @contextmanager
    def reserved(self, num_bytes: int, *, take_in_use: bool) -> Iterator[bool]:
        """Hold room.lock during the block, and yield whether `num_bytes` fit below the limit.

        Shards are evicted to make them fit; none, if that is not enough. With `take_in_use`, shards that others have
        open may be evicted too; InputError if even that is not enough.
        """
        with locked(self._root / _ROOM) as lock:
            assert lock is not None
            total = _read_total(lock) if self._has_counted else None
            if total is None or total + num_bytes > self._limit:
                total = self._evict(num_bytes, take_in_use)
                self._has_counted = True
            if total + num_bytes > self._limit:
                _write_total(lock, total)
                yield False
            else:
                _write_total(lock, total + num_bytes)
                yield True

    def _evict(self, num_bytes: int, take_in_use: bool) -> int:
        """Evict shards for `num_bytes`, if that is possible. Return the number of bytes taken afterwards."""
        while True:
            present = _scan(self._root)
            total = sum(cached.num_bytes for cached in present)
            excess = total + num_bytes - self._limit
            if excess <= 0:
                return total
            victims = _victims(present, excess, self._limit // _SPARE, take_in_use)
            if sum(victim.num_bytes for victim in victims) < excess:
                if take_in_use and not any(cached.path.suffix == _TEMPORARY for cached in present):
                    raise InputError(
                        f"data.cache.max_gib: {self._limit / 2**30:.3g} GiB leave no room for a shard beside the "
                        f"indexes in {self._root}; raise it, or delete the folders of datasets no longer in use"
                    )
                return total
            # One may be gone already, where a fetch has ended and renamed it meanwhile: hence the second look.
            for victim in victims:
                _delete(victim.path)


def forget_total(root: Path) -> None:
    """Let the next process count again, since a file was added to the cache without its Room."""
    with locked(root / _ROOM) as lock:
        assert lock is not None
        os.ftruncate(lock.fileno(), 0)


def _read_total(lock: BinaryIO) -> int | None:
    content = os.pread(lock.fileno(), len(_TOTAL % 0), 0)
    return int(content) if content.isdigit() else None


def _write_total(lock: BinaryIO, total: int) -> None:
    try:
        os.pwrite(lock.fileno(), _TOTAL % total, 0)
    except OSError:  # the disk is full
        os.ftruncate(lock.fileno(), 0)


class _Cached(NamedTuple):
    opened_ns: int
    num_bytes: int
    path: Path


def _scan(root: Path) -> list[_Cached]:
    """Return all files in the cache, opened longest ago first.

    In two passes: of a file that is renamed in the meantime, one pass over its folder may see neither name.
    """
    present: dict[Path, _Cached] = {}
    for folder in 2 * list(root.glob(_DATASET_FOLDERS)):
        with suppress(FileNotFoundError):  # a user deletes a dataset that is no longer in use
            for entry in os.scandir(folder):
                if not entry.name.endswith(LOCK):
                    with suppress(FileNotFoundError):
                        path, status = Path(entry.path), entry.stat()
                        present[_final(path)] = _Cached(status.st_mtime_ns, status.st_size, path)
    return sorted(present.values())


def _victims(present: list[_Cached], excess: int, spare: int, take_in_use: bool) -> list[_Cached]:
    """Choose files to delete: idle ones and those of dead processes, `spare` beyond the excess, then shards in use."""
    victims: list[_Cached] = []
    in_use = []
    freed = 0
    for cached in present:
        if freed >= excess + spare:
            break
        if cached.path.suffix == INDEX:
            continue
        if _is_idle(cached.path):
            victims.append(cached)
            freed += cached.num_bytes
        elif cached.path.suffix != _TEMPORARY:
            in_use.append(cached)
    for cached in in_use if take_in_use else []:
        if freed >= excess:
            break
        victims.append(cached)
        freed += cached.num_bytes
    return victims


def _is_idle(path: Path) -> bool:
    """Return whether no living process has a shard open, or is fetching it."""
    lock = lock_of(_final(path)) if path.suffix == _TEMPORARY else path
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # a fetch has just renamed it
        return True
    return True


def _delete(path: Path) -> None:
    """Delete a shard, with its lock file unless another process is about to fetch it again."""
    with suppress(FileNotFoundError), locked(lock_of(_final(path)), wait=False) as lock:
        path.unlink(missing_ok=True)
        if lock is not None:
            lock_of(_final(path)).unlink(missing_ok=True)


def _final(path: Path) -> Path:
    """Return the final path of a file that is being fetched."""
    return path.with_name(path.name.rsplit(".", 2)[0]) if path.suffix == _TEMPORARY else path


def lock_of(path: Path) -> Path:
    """Return the path of a file's lock file."""
    return path.with_name(path.name + LOCK)


@contextmanager
def locked(path: Path, *, wait: bool = True, stop: threading.Event | None = None) -> Iterator[BinaryIO | None]:
    """Hold the exclusive lock of a lock file and yield the file; None if another process has it and `wait` is False.

    Raises PomscaleError soon after `stop` is set, InputError where the file cannot be made.
    """
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except PermissionError as error:
            raise InputError(
                f"{path}: cannot be locked: {error}; set data.cache.path to a folder of your own"
            ) from error
        with file:
            if not _acquire(file, path, wait, stop):
                yield None
                return
            if _is_file(path, file):  # else it was deleted with its shard while this one waited
                yield file
                return


def _acquire(file: BinaryIO, path: Path, wait: bool, stop: threading.Event | None) -> bool:
    if wait and stop is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait or stop is None:
                return False
            if stop.wait(POLL_S):
                raise PomscaleError(f"{path}: reading was stopped") from None
        else:
            return True


def _is_file(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
