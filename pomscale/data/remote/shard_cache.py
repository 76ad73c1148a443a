"""Whole files of datasets on a disk of this node, shared by its processes.

    PATH/room.lock                       held while room is made, by one process at a time; says how much is taken
    PATH/FINGERPRINT/NAME                a shard; FINGERPRINT = the first 16 hex digits of Manifest.fingerprint
    PATH/FINGERPRINT/NAME.lock           held by the process that fetches the shard
    PATH/FINGERPRINT/NAME.PID-TOKEN.tmp  a shard that is being fetched; its whole room is taken from the start
    PATH/FINGERPRINT/index-SHA256.npy    an index

A file under its final name is whole: it was checked on the way, and synced before it was renamed, since it is not
hashed again after a power cut. Locks are flock's, which the kernel takes from a process that dies. An open shard has a
shared lock until the last mapping of it is gone: that is how other processes see that it is in use. A shard that is
deleted all the same stays readable for those who have it mapped.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedRandom
from pathlib import Path

import numpy as np

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, make_folder, remove_leftovers
from pomscale.config.data import CacheConfig
from pomscale.data.mapping import map_file
from pomscale.data.remote.cache_room import INDEX, NUM_DIGITS, POLL_S, Room, forget_total, lock_of, locked
from pomscale.data.remote.fetch import DatasetFile, fetch
from pomscale.data.remote.fetched_shards import Drop
from pomscale.shards.location import local_folder, unreadable
from pomscale.shards.schema import INDEX_NAME, Manifest

_GIB = 2**30


class ShardCache:
    """The shards of one dataset in the cache of this node. Safe to share between threads.

    The limit is that of the folder, all datasets together: room is made by deleting the shards that were opened
    longest ago, those in use last, and of these the caller's own, which it lets go, before those of others, whose room
    the disk has again when they are no longer mapped. Indexes count but stay, since processes map them for as long as
    they run.
    """

    def __init__(self, location: str, manifest: Manifest, config: CacheConfig) -> None:
        self._files = [DatasetFile(location, shard.name, shard.num_bytes, shard.sha256) for shard in manifest.shards]
        self._root = Path(config.path)
        self._folder = _make_dataset_folder(self._root, manifest)
        limit = int(config.max_gib * _GIB)
        self._room = Room(self._root, limit)
        largest = max((file.num_bytes for file in self._files), default=0)
        if largest > limit:
            raise InputError(
                f"data.cache.max_gib: {config.max_gib:g} GiB cannot hold a shard of {location}, "
                f"{largest / _GIB:.3g} GiB; raise it, or use data.reading: streamed"
            )

    def open(self, shard: int, stop: threading.Event, ahead: bool, drop: Drop) -> np.ndarray | None:
        """A shard, memory-mapped, fetched first if it is missing. It counts as in use for as long as the array lives.

        With `ahead`, for what is not needed yet: None if another process is fetching the shard right now, or if there
        is no room for it beside the shards in use. Errors are those of `fetch`, and PomscaleError where the disk is
        full or fails.
        """
        file = self._files[shard]
        path = self._folder / file.name
        with _failures_told(path):
            # In a loop, since a shard may be evicted between its arrival and its opening.
            while (opened := _open_in_use(path, file.num_bytes)) is None:
                make_folder(self._folder)  # it may have been deleted meanwhile
                with locked(lock_of(path), wait=not ahead, stop=stop) as lock:
                    if lock is None:
                        return None
                    if not _is_whole(path, file.num_bytes) and not self._fetch(file, path, stop, ahead, drop):
                        return None
        return opened

    def discard(self, shard: int) -> None:
        """Delete the copy of a shard, whose bytes were found to be wrong."""
        path = self._folder / self._files[shard].name
        with _failures_told(path):
            path.unlink(missing_ok=True)

    def _fetch(self, file: DatasetFile, path: Path, stop: threading.Event, ahead: bool, drop: Drop) -> bool:
        remove_leftovers(path.parent, path.name)
        take_in_use = False
        with ExitStack() as stack:
            while (stream := self._reserve(path, file.num_bytes, take_in_use, stack)) is None:
                if drop(file.num_bytes):
                    continue
                if ahead:
                    return False
                if take_in_use and stop.wait(POLL_S):
                    raise PomscaleError(f"{file.source}: reading was stopped")
                take_in_use = True
            _fetch_into(stream, file, stop)
        return True

    def _reserve(self, path: Path, num_bytes: int, take_in_use: bool, stack: ExitStack) -> BufferedRandom | None:
        """The stream of `atomic_write` with all its room, entered into `stack`. None if there is no room now."""
        with self._room.reserved(num_bytes, take_in_use=take_in_use) as fits:
            if not fits:
                return None
            stream = stack.enter_context(atomic_write(path))
            try:
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
            except OSError as error:
                raise PomscaleError(
                    f"data.cache.path {self._root}: no room for {path.name}, {num_bytes:,} bytes: {error}. "
                    f"Lower data.cache.max_gib to what this disk can spare, or name a folder on another disk"
                ) from error
            return stream


def local_index(location: str, manifest: Manifest, cache: CacheConfig | None) -> Path:
    """The index of a dataset on this machine: in the folder itself, or behind a URL a copy of it, fetched once.

    The copy is in the cache, without one in $XDG_CACHE_HOME/pomscale (~/.cache/pomscale). Errors are those of `fetch`,
    and PomscaleError where the disk is full or fails.
    """
    folder = local_folder(location)
    if folder is not None:
        return folder / INDEX_NAME
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = home / "pomscale" if cache is None else Path(cache.path)
    file = DatasetFile(location, INDEX_NAME, manifest.index.num_bytes, manifest.index.sha256)
    path = _make_dataset_folder(root, manifest) / f"index-{file.sha256[:16]}{INDEX}"
    with _failures_told(path), locked(lock_of(path)):
        if not _is_whole(path, file.num_bytes):
            remove_leftovers(path.parent, path.name)
            with atomic_write(path) as stream:
                _fetch_into(stream, file, threading.Event())
            forget_total(root)
    return path


def _make_dataset_folder(root: Path, manifest: Manifest) -> Path:
    folder = root / manifest.fingerprint[:NUM_DIGITS]
    make_folder(folder)
    return folder


def _fetch_into(stream: BufferedRandom, file: DatasetFile, stop: threading.Event) -> None:
    def write(offset: int, chunk: bytes) -> None:
        stream.seek(offset)
        stream.write(chunk)

    fetch(file, write, stop, check_sha256=True)


def _open_in_use(path: Path, num_bytes: int) -> np.ndarray | None:
    """A shard with the lock that says so, which the mapping keeps. None if it is not there, or not whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size != num_bytes:
            return None
        now = time.time_ns()  # by the kernel's own clock shards that are opened together would tie
        os.utime(file.fileno(), ns=(now, now))
        return map_file(file, num_bytes)


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """What this machine fails to do with the cache is no fault of the dataset."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
