"""Whole files of datasets on a disk of this node, shared by its processes.

    PATH/room.lock                       held while room is made, by one process at a time
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
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pomscale.config.schema import CacheConfig
from pomscale.data.fetch import DatasetFile, fetch
from pomscale.data.location import local_folder
from pomscale.data.schema import INDEX_NAME, Manifest
from pomscale.errors import InputError, PomscaleError
from pomscale.files import atomic_write, make_folder, remove_leftovers

_GIB = 2**30
_LOCK = ".lock"
_TEMPORARY = ".tmp"
_INDEX = ".npy"

# Nothing else in the folder that the user named is counted or deleted.
_NUM_DIGITS = 16
_DATASET_FOLDERS = _NUM_DIGITS * "[0-9a-f]"

# How often to look for room again while all of it belongs to shards that others are fetching.
_ROOM_POLL_S = 0.05


class ShardCache:
    """The shards of one dataset in the cache of this node. Safe to share between threads.

    The limit is that of the folder, all datasets together: room is made by deleting the shards that were opened
    longest ago, those in use last. The disk has the room of one of these again when it is no longer mapped. Indexes
    count but stay, since processes map them for as long as they run.
    """

    def __init__(self, location: str, manifest: Manifest, config: CacheConfig) -> None:
        self._files = [DatasetFile(location, shard.name, shard.num_bytes, shard.sha256) for shard in manifest.shards]
        self._root = Path(config.path)
        self._folder = _make_dataset_folder(self._root, manifest)
        self._limit = int(config.max_gib * _GIB)
        largest = max((file.num_bytes for file in self._files), default=0)
        if largest > self._limit:
            raise InputError(
                f"data.cache.max_gib: {config.max_gib:g} GiB cannot hold a shard of {location}, "
                f"{largest / _GIB:.3g} GiB; raise it, or use data.reading: streamed"
            )

    def open(self, shard: int, stop: threading.Event, *, ahead: bool) -> BinaryIO | None:
        """A shard's file, fetched first if it is missing. It counts as in use until it and its mappings are closed.

        With `ahead`, for what is not needed yet: None if another process is fetching the shard right now, or if there
        is no room for it beside the shards in use. Errors are those of `fetch`, and PomscaleError where the disk is
        full.
        """
        file = self._files[shard]
        path = self._folder / file.name
        # In a loop, since a shard may be evicted between its arrival and its opening.
        while (opened := _open_in_use(path, file.num_bytes)) is None:
            with _locked(_lock_of(path), wait=not ahead) as locked:
                if not locked:
                    return None
                if not _is_whole(path, file.num_bytes) and not self._fetch(file, path, stop, ahead):
                    return None
        return opened

    def _fetch(self, file: DatasetFile, path: Path, stop: threading.Event, ahead: bool) -> bool:
        remove_leftovers(path.parent, path.name)
        with ExitStack() as stack:
            while (stream := self._reserve(path, file.num_bytes, ahead, stack)) is None:
                if ahead:
                    return False
                if stop.wait(_ROOM_POLL_S):
                    raise PomscaleError(f"{file.source}: reading was stopped")
            _fetch_into(stream, file, stop)
        return True

    def _reserve(self, path: Path, num_bytes: int, ahead: bool, stack: ExitStack) -> BufferedRandom | None:
        """The stream of `atomic_write` with all its room, entered into `stack`. None if there is no room now."""
        with _locked(self._root / f"room{_LOCK}"):
            if not self._make_room(num_bytes, take_in_use=not ahead):
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

    def _make_room(self, num_bytes: int, take_in_use: bool) -> bool:
        """Evict until `num_bytes` fit below the limit, all that it takes or nothing. For the holder of room.lock."""
        while True:
            present = _scan(self._root)
            excess = sum(cached.num_bytes for cached in present) + num_bytes - self._limit
            victims = []
            candidates = _evictable(present, take_in_use)
            while excess > 0:
                victim = next(candidates, None)
                if victim is None:
                    if take_in_use and not any(cached.path.suffix == _TEMPORARY for cached in present):
                        raise InputError(
                            f"data.cache.max_gib: {self._limit / _GIB:.3g} GiB leave no room for a shard beside the "
                            f"indexes in {self._root}; raise it, or delete the folders of datasets no longer in use"
                        )
                    return False
                victims.append(victim)
                excess -= victim.num_bytes
            if not victims:
                return True
            for victim in victims:
                # Gone already where a fetch has ended and renamed it meanwhile: hence the second look.
                victim.path.unlink(missing_ok=True)


def local_index(location: str, manifest: Manifest, cache: CacheConfig | None) -> Path:
    """The index of a dataset on this machine: in the folder itself, or behind a URL a copy of it, fetched once.

    The copy is in the cache, without one in $XDG_CACHE_HOME/pomscale (~/.cache/pomscale). Errors are those of `fetch`,
    and PomscaleError where the disk is full.
    """
    folder = local_folder(location)
    if folder is not None:
        return folder / INDEX_NAME
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = home / "pomscale" if cache is None else Path(cache.path)
    file = DatasetFile(location, INDEX_NAME, manifest.index.num_bytes, manifest.index.sha256)
    path = _make_dataset_folder(root, manifest) / f"index-{file.sha256[:16]}{_INDEX}"
    with _locked(_lock_of(path)):
        if not _is_whole(path, file.num_bytes):
            remove_leftovers(path.parent, path.name)
            with atomic_write(path) as stream:
                _fetch_into(stream, file, threading.Event())
    return path


def _make_dataset_folder(root: Path, manifest: Manifest) -> Path:
    folder = root / manifest.fingerprint[:_NUM_DIGITS]
    make_folder(folder)
    return folder


def _fetch_into(stream: BufferedRandom, file: DatasetFile, stop: threading.Event) -> None:
    def write(offset: int, chunk: bytes) -> None:
        stream.seek(offset)
        stream.write(chunk)

    fetch(file, write, stop, check_sha256=True)


def _open_in_use(path: Path, num_bytes: int) -> BinaryIO | None:
    """A shard's file with the lock that says so, which a mapping keeps, as it duplicates the descriptor."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    status = os.fstat(file.fileno())
    if status.st_size != num_bytes:
        file.close()
        return None
    now = time.time_ns()  # by the kernel's own clock shards that are opened together would tie
    os.utime(file.fileno(), ns=(now, now))
    return file


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


class _Cached(NamedTuple):
    opened_ns: int
    num_bytes: int
    path: Path


def _scan(root: Path) -> list[_Cached]:
    """All that fills the cache, opened longest ago first.

    In two passes: of a file that is renamed in the meantime, one pass over its folder may see neither name.
    """
    present: dict[Path, _Cached] = {}
    for folder in 2 * list(root.glob(_DATASET_FOLDERS)):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                path, status = Path(entry.path), entry.stat()
                present[_final(path)] = _Cached(status.st_mtime_ns, status.st_size, path)
    return sorted(present.values())


def _evictable(present: list[_Cached], take_in_use: bool) -> Iterator[_Cached]:
    """What may be deleted, in this order: idle shards and what dead processes left, then shards in use."""
    in_use = []
    for cached in present:
        if cached.path.suffix in (_LOCK, _INDEX):
            continue
        if _is_idle(cached.path):
            yield cached
        elif take_in_use and cached.path.suffix != _TEMPORARY:
            in_use.append(cached)
    yield from in_use


def _is_idle(path: Path) -> bool:
    """Whether no living process has a shard open, or is fetching it."""
    lock = _lock_of(_final(path)) if path.suffix == _TEMPORARY else path
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # a fetch has just renamed it
        return True
    return True


def _final(path: Path) -> Path:
    """What a file that is being fetched will be."""
    return path.with_name(path.name.rsplit(".", 2)[0]) if path.suffix == _TEMPORARY else path


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the exclusive lock of a lock file, or, if it is not to wait for it, says False."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error}; set data.cache.path to a folder of your own") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except BlockingIOError:
            locked = False
        yield locked
