"""Where the bytes of shards come from: a local folder, the cache of a node, or a stream that nobody keeps."""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np

from pomscale.config.schema import CacheConfig
from pomscale.data.fetch import DatasetFile, fetch
from pomscale.data.fetched_shards import FetchedShards
from pomscale.data.location import local_folder
from pomscale.data.schema import Manifest
from pomscale.data.shard_cache import ShardCache
from pomscale.errors import InputError

# Every mapped shard holds a file descriptor; the usual limit of a process is 1,024 of them, and training opens two
# datasets.
_MAX_MAPPED = 256

# Background threads of a process. All processes of a node fill its cache, each with another shard; streams are private.
_NUM_CACHE_FETCHERS = 1
_NUM_STREAM_FETCHERS = 4


class ShardFiles(Protocol):
    """The bytes of a dataset's shards, by their number in the manifest. Safe to share between threads."""

    def open(self, shard: int) -> np.ndarray:
        """All bytes of a shard, (num_bytes,) uint8, read-only; they stay readable for as long as the array lives.

        InputError, naming file and remedy, if it is missing or is not what the manifest says; PomscaleError if the
        network or this node's disk fails.
        """

    def will_need(self, shards: Sequence[int]) -> None:
        """The shards needed from now on, soonest first, those in use among them. Returns at once.

        The list replaces the one before. A shard that is in neither of the two may be dropped, and is then fetched
        again when it is opened.
        """

    def close(self) -> None:
        """Ends what runs in the background. Arrays that were handed out stay readable."""


def open_shard_files(
    location: str, manifest: Manifest, reading: Literal["mapped", "streamed"], cache: CacheConfig | None
) -> ShardFiles:
    """The shards of the dataset at `location`, a folder or a URL, read as `data.reading` and `data.cache` say.

    Mapped, memory is the page cache's. Streamed, each process fetches every shard it needs for itself, and has those of
    the last two announcements in memory. InputError for a URL that is to be mapped without a cache.
    """
    folder = local_folder(location)
    if reading == "streamed":
        return FetchedShards(functools.partial(_stream, location, manifest), _NUM_STREAM_FETCHERS)
    if cache is not None:
        return FetchedShards(functools.partial(_map_cached, ShardCache(location, manifest, cache)), _NUM_CACHE_FETCHERS)
    if folder is None:
        raise InputError(
            f"dataset {location} is remote: set data.cache.path to a folder on this node's disk, "
            f"or data.reading: streamed"
        )
    return MappedShards(folder, manifest)


class MappedShards:
    """A local folder: shards are memory-mapped, so only what is read of them costs."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self.open = functools.lru_cache(maxsize=_MAX_MAPPED)(self._map_shard)

    def will_need(self, shards: Sequence[int]) -> None:
        """There is nothing to fetch."""

    def close(self) -> None:
        self.open.cache_clear()

    def _map_shard(self, shard: int) -> np.ndarray:
        info = self._manifest.shards[shard]
        file = DatasetFile(str(self._folder), info.name, info.num_bytes, info.sha256)
        try:
            with (self._folder / info.name).open("rb") as opened:
                content = _map(opened)
        except (OSError, ValueError) as error:
            raise file.refused(f"cannot be read: {error}") from error
        if len(content) != info.num_bytes:
            raise file.refused(f"has {len(content):,} bytes, but the manifest says {info.num_bytes:,}")
        return content


def _map_cached(cache: ShardCache, shard: int, stop: threading.Event, ahead: bool) -> np.ndarray | None:
    opened = cache.open(shard, stop, ahead=ahead)
    if opened is None:
        return None
    with opened:
        return _map(opened)


def _stream(location: str, manifest: Manifest, shard: int, stop: threading.Event, ahead: bool) -> np.ndarray:
    """A shard into memory. Its sha256 is left alone: every record has a checksum, and a bad one spoils itself only."""
    info = manifest.shards[shard]
    content = np.empty(info.num_bytes, np.uint8)

    def write(offset: int, chunk: bytes) -> None:
        content[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)

    fetch(DatasetFile(location, info.name, info.num_bytes, info.sha256), write, stop, check_sha256=False)
    content.flags.writeable = False
    return content


def _map(file: BinaryIO) -> np.ndarray:
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
