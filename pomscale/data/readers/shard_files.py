"""The bytes of shards, from a local folder, from the cache of a node, or streamed into memory."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pomscale.base.errors import InputError
from pomscale.config.data import CacheConfig
from pomscale.data.mapping import map_file
from pomscale.data.remote.fetch import DatasetFile, fetch
from pomscale.data.remote.fetched_shards import Drop, FetchedShards
from pomscale.data.remote.shard_cache import ShardCache
from pomscale.shards.location import local_folder, unreadable
from pomscale.shards.schema import Manifest

_GIB = 2**30

# Mapped shards kept per dataset. They need no descriptors; the kernel allows a process 65,530 mappings.
_MAX_MAPPED = 512

# Most memory that the shards of a process that streams may take.
_MAX_STREAMED_GIB = 16

# Background threads of a process. All processes of a node fill its cache, each with another shard; streams are private.
_NUM_CACHE_FETCHERS = 1
_NUM_STREAM_FETCHERS = 4


class ShardFiles(Protocol):
    """The bytes of a dataset's shards, by their number in the manifest. Safe to share between threads."""

    reads_ahead: bool
    """Whether `will_need` has an effect."""

    def open(self, shard: int) -> np.ndarray:
        """Return all bytes of a shard, (num_bytes,) uint8, read-only, readable for as long as the array lives.

        Raises DamagedFile, naming file and remedy, if it is missing or is not what the manifest says; PomscaleError if
        the network, this node's disk or the process's limits fail.
        """

    def will_need(self, shards: Sequence[int]) -> None:
        """Announce the shards needed next, soonest first, those in use among them. Returns at once.

        The list replaces the one before. A shard that is in neither of the two may be dropped, and is then fetched
        again when it is opened.
        """

    def renew(self, shard: int) -> bool:
        """Return whether a shard with wrong bytes is a copy, which is then fetched again, once."""

    def close(self) -> None:
        """End the background threads. Arrays that were returned stay readable."""


def open_shard_files(
    location: str, manifest: Manifest, reading: Literal["mapped", "streamed"], cache: CacheConfig | None
) -> ShardFiles:
    """Open the shards of the dataset at `location`, a folder or a URL, read as `data.reading` and `data.cache` say.

    Mapped shards take memory of the page cache only. Streamed, each process fetches every shard that it needs, and
    keeps those of the last two announcements in memory. Raises InputError for a URL that is to be mapped without a
    cache.
    """
    folder = local_folder(location)
    if reading == "streamed":
        return FetchedShards(functools.partial(_stream, location, manifest), _NUM_STREAM_FETCHERS)
    if cache is not None:
        shards = ShardCache(location, manifest, cache)
        return FetchedShards(shards.open, _NUM_CACHE_FETCHERS, shards.discard)
    if folder is None:
        raise InputError(
            f"dataset {location} is remote: set data.cache.path to a folder on this node's disk, "
            f"or data.reading: streamed"
        )
    return MappedShards(folder, manifest)


def check_room(
    num_bytes: int, shuffle_window: int, reading: Literal["mapped", "streamed"], cache: CacheConfig | None
) -> None:
    """Raise InputError if the shards of two windows do not fit into the cache, or into memory where they are streamed.

    These are the windows in use and the next ones, `num_bytes` in all datasets of a run. With less room, every record
    in shuffled order would cost the fetch of a shard.
    """
    shards = (
        f"data.shuffle_window: the shards of two windows of {shuffle_window:,} records take {num_bytes / _GIB:.3g} GiB"
    )
    if reading == "streamed":
        if num_bytes > _MAX_STREAMED_GIB * _GIB:
            raise InputError(
                f"{shards}, more than the {_MAX_STREAMED_GIB} GiB of memory that data.reading: streamed may take per "
                f"process; lower it, or set data.cache.path to a folder on this node's disk"
            )
    elif cache is not None and num_bytes > cache.max_gib * _GIB:
        raise InputError(f"{shards}, more than data.cache.max_gib {cache.max_gib:g}; lower the one or raise the other")


class MappedShards:
    """The shards of a local folder, memory-mapped, so only the parts that are read cost."""

    reads_ahead = False

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self.open = functools.lru_cache(maxsize=_MAX_MAPPED)(self._map_shard)

    def will_need(self, shards: Sequence[int]) -> None:
        """Do nothing, since there is nothing to fetch."""

    def renew(self, shard: int) -> bool:
        """Return False: these bytes are no copy."""
        return False

    def close(self) -> None:
        self.open.cache_clear()

    def _map_shard(self, shard: int) -> np.ndarray:
        info = self._manifest.shards[shard]
        file = DatasetFile(str(self._folder), info.name, info.num_bytes, info.sha256)
        try:
            with (self._folder / info.name).open("rb") as opened:
                num_bytes = os.fstat(opened.fileno()).st_size
                if num_bytes != info.num_bytes:
                    raise file.refused(f"has {num_bytes:,} bytes, but the manifest says {info.num_bytes:,}")
                return map_file(opened, num_bytes)
        except FileNotFoundError as error:
            raise file.refused(f"cannot be read: {error}") from error
        except OSError as error:
            raise unreadable(file.source, error) from error


def _stream(
    location: str, manifest: Manifest, shard: int, stop: threading.Event, _ahead: bool, _drop: Drop
) -> np.ndarray:
    """Read a shard into memory. Its sha256 is not checked, since every record has a checksum of its own."""
    info = manifest.shards[shard]
    content = np.empty(info.num_bytes, np.uint8)

    def write(offset: int, chunk: bytes) -> None:
        content[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)

    fetch(DatasetFile(location, info.name, info.num_bytes, info.sha256), write, stop, check_sha256=False)
    content.flags.writeable = False
    return content
