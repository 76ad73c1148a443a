"""One part of one dataset on its way to disk: its shards, its failures, and their commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from io import BufferedRandom

import numpy as np

from data_pipelines.shards.parts import Failure, PartRecord, PartStore
from data_pipelines.shards.statistics import ChannelStatistics, RunningStatistics
from data_pipelines.shards.writer import Record, ShardWriter
from data_pipelines.sources.source import Item
from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write
from pomscale.shards.index import index_dtype
from pomscale.shards.schema import ArrayName, ShardInfo


@dataclass
class _OpenShard:
    stream: BufferedRandom
    writer: ShardWriter
    # One per shard: merged in the order of groups, they do not depend on how groups took turns.
    statistics: RunningStatistics = field(default_factory=RunningStatistics)


class PartWriter:
    """Nothing has its final name before `commit`. To be used by one thread at a time, in the order of the items."""

    def __init__(self, store: PartStore, part: int, arrays: Sequence[ArrayName], stores_moments: bool) -> None:
        self._store = store
        self._part = part
        self._arrays = arrays
        self._stores_moments = stores_moments
        self._files = ExitStack()
        self._shards: dict[int, _OpenShard] = {}
        self._failures: list[tuple[int, Failure]] = []
        store.clear(part)

    def add(self, group: int, record: Record) -> int:
        """Appends a record to the shard of its group. Returns the bytes that it takes."""
        if group not in self._shards:
            stream = self._files.enter_context(atomic_write(self._store.shard_path(self._part, group)))
            self._shards[group] = _OpenShard(stream, ShardWriter(stream))
        shard = self._shards[group]
        begin = shard.stream.tell()
        shard.writer.add(record)
        for name in ("latent", "flip"):
            if name in record.arrays:
                shard.statistics.add(record.arrays[name], self._stores_moments)
        return shard.stream.tell() - begin

    def fail(self, place: int, item: Item, reason: str) -> None:
        self._failures.append((place, Failure(key=item.key, path=item.where, reason=reason)))

    def commit(self) -> None:
        """Shards to disk under their names, then rows and record. PomscaleError where the disk is full."""
        shards, all_rows = [], [np.empty(0, index_dtype(self._arrays))]
        statistics: ChannelStatistics | None = None
        for group, shard in sorted(self._shards.items()):
            rows = shard.writer.finish()
            num_bytes, sha256 = num_bytes_and_sha256(shard.stream)
            name = self._store.shard_path(self._part, group).name
            shards.append(ShardInfo(name=name, num_samples=len(rows), num_bytes=num_bytes, sha256=sha256, group=group))
            all_rows.append(rows)
            mine = shard.statistics.result()
            statistics = mine if statistics is None or mine is None else statistics.merge(mine)
        self._files.close()
        failures = tuple(failure for _, failure in sorted(self._failures, key=lambda pair: pair[0]))
        record = PartRecord(shards=tuple(shards), statistics=statistics, failures=failures)
        self._store.commit(self._part, record, np.concatenate(all_rows))

    def abandon(self) -> None:
        """Leaves nothing behind; of no effect after `commit`."""
        # On a full disk closing a file fails once more, after it is gone; the first error is the one that is told.
        with suppress(PomscaleError):
            self._files.__exit__(InterruptedError, InterruptedError(), None)


def num_bytes_and_sha256(stream: BufferedRandom) -> tuple[int, str]:
    """Of all that was written to the stream so far."""
    num_bytes = stream.tell()
    stream.seek(0)
    return num_bytes, hashlib.file_digest(stream, "sha256").hexdigest()
