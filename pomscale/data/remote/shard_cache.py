"""A cache of whole files of datasets on a disk of this node, shared by its processes.

    PATH/room.lock                       held by the process that makes room; has the number of bytes taken
    PATH/FINGERPRINT/NAME                a shard; FINGERPRINT = the first 16 hex digits of Manifest.fingerprint
    PATH/FINGERPRINT/NAME.lock           held by the process that fetches the shard
    PATH/FINGERPRINT/NAME.PID-TOKEN.tmp  a shard that is being fetched; its whole size is allocated at once
    PATH/FINGERPRINT/index-SHA256.npy    an index

A file under its final name is whole: it was checked while it was fetched, and synced before it was renamed, since it is
not hashed again after a power cut. Locks are flock's, which the kernel releases when a process dies. An open shard has
a shared lock until its last mapping is gone, which tells other processes that it is in use. A shard that is deleted
nevertheless stays readable for the processes that have it mapped.
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

    The limit holds for the folder, all datasets together. Room is made by deleting the shards that were opened longest
    ago, those in use last: first the caller's own, which it drops, then those of others, whose space is free once they
    are no longer mapped. Indexes count but stay, since processes map them for as long as they run.
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
        """Return a shard, memory-mapped, fetched first if it is missing. It is in use for as long as the array lives.

        With `ahead`, for a shard that is not needed yet, return None if another process is fetching it right now, or if
        there is no room for it beside the shards in use. Raises the errors of `fetch`, and PomscaleError where the disk
        is full or fails.
        """
        file = self._files[shard]
        path = self._folder / file.name
        with _disk_errors_explained(path):
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
        with _disk_errors_explained(path):
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
        """Return the stream of `atomic_write` with all its space, entered into `stack`; None if there is no room."""
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
    """Return the local path of a dataset's index: in the folder itself, or, for a URL, of a copy fetched once.

    The copy is in the cache; without a cache in $XDG_CACHE_HOME/pomscale (~/.cache/pomscale). Raises the errors of
    `fetch`, and PomscaleError where the disk is full or fails.
    """
    folder = local_folder(location)
    if folder is not None:
        return folder / INDEX_NAME
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = user_cache / "pomscale" if cache is None else Path(cache.path)
    file = DatasetFile(location, INDEX_NAME, manifest.index.num_bytes, manifest.index.sha256)
    path = _make_dataset_folder(root, manifest) / f"index-{file.sha256[:16]}{INDEX}"
    with _disk_errors_explained(path), locked(lock_of(path)):
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
    """Map a shard with a shared lock, which the mapping keeps. None if it is missing, or not whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size != num_bytes:
            return None
        now = time.time_ns()  # the kernel's own clock would give shards that are opened together the same time
        os.utime(file.fileno(), ns=(now, now))
        return map_file(file, num_bytes)


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


@contextmanager
def _disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn errors of the cache's disk into errors that do not blame the dataset."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
