"""Writers of a dataset's files: one tar, one part (its tars, failures and index rows), and the index.

A shard is a tar that any WebDataset reader opens; the writers note where each record went.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import isal_zlib

from data_pipelines.shards.parts import Failure, PartRecord, PartStore
from data_pipelines.shards.statistics import ChannelStatistics, RunningStatistics
from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write
from pomscale.shards.index import NO_LABEL, index_dtype, key_hash, npy_header, to_npy
from pomscale.shards.schema import (
    ARRAY_MEMBERS,
    CAPTION_MEMBER,
    CLASS_MEMBER,
    INDEX_NAME,
    INFO_MEMBER,
    ArrayName,
    IndexInfo,
    ShardInfo,
)
from pomscale.sources.protocol import Item


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it is stored. The records of a dataset have the same arrays, but for captions that some have."""

    key: str
    arrays: Mapping[ArrayName, np.ndarray]
    """Arrays by name. latent, flip: unscaled (c, h, w) or (c, f, h, w), float16, moments with 2c channels, or pixels
    (c, h, w) uint8; text and its like: (tokens, dim) float16."""
    label: int | None
    caption: str | None
    info: dict[str, Any]
    """Provenance, stored as JSON."""
    packed: Mapping[ArrayName, bytes] = field(default_factory=dict)
    """Members of arrays that are packed already; the others become .npy."""


class ShardWriter:
    """Writes one tar, byte for byte a function of the records: plain ustar headers without times or owners."""

    def __init__(
        self, stream: BinaryIO, arrays: Sequence[ArrayName], members: Mapping[ArrayName, str] = ARRAY_MEMBERS
    ) -> None:
        """Begin a tar of records with these arrays, in members of these suffixes (`Manifest.array_members`)."""
        self._stream = stream
        self._begin = stream.tell()
        self._arrays = arrays
        self._members = members
        self._rows: list[tuple[int, ...]] = []

    def add(self, record: Record) -> None:
        offset, blocks = self._stream.tell(), bytearray()
        fields: list[int] = []
        for name in self._arrays:
            if name not in record.arrays:
                fields += (0, 0, 0)
                continue
            payload = record.packed[name] if name in record.packed else to_npy(record.arrays[name])
            _append_member(blocks, record.key + self._members[name], payload)
            end = offset + len(blocks) - _padding(len(payload))
            fields += (end - len(payload), len(payload), isal_zlib.crc32(payload))
        if record.label is not None:
            _append_member(blocks, record.key + CLASS_MEMBER, str(record.label).encode())
        if record.caption is not None:
            _append_member(blocks, record.key + CAPTION_MEMBER, record.caption.encode())
        _append_member(blocks, record.key + INFO_MEMBER, json.dumps(record.info, sort_keys=True).encode())
        self._stream.write(blocks)
        label = NO_LABEL if record.label is None else record.label
        self._rows.append((key_hash(record.key), 0, label, *fields, isal_zlib.crc32(blocks)))

    def finish(self) -> np.ndarray:
        """End the tar and return the index rows.

        Their shard number, 0 here, is set when the parts are put together.
        """
        self._stream.write(tar_end(self._stream.tell() - self._begin))
        return np.array(self._rows, index_dtype(self._arrays))


def _append_member(blocks: bytearray, name: str, payload: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    header.mode = 0o644
    blocks += header.tobuf(tarfile.USTAR_FORMAT)
    blocks += payload
    blocks += bytes(_padding(len(payload)))


def _padding(num_bytes: int) -> int:
    """Return the number of zeros that follow a payload, up to a whole block."""
    return -num_bytes % tarfile.BLOCKSIZE


def tar_end(num_bytes: int) -> bytes:
    """Return the end of a tar whose members take `num_bytes`: two empty blocks, and zeros up to a whole tar record."""
    return bytes(2 * tarfile.BLOCKSIZE + -(num_bytes + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)


@dataclass
class _OpenShard:
    stream: BufferedRandom
    writer: ShardWriter
    # One per shard: merged in the order of groups, they do not depend on how groups took turns.
    statistics: RunningStatistics = field(default_factory=RunningStatistics)


class PartWriter:
    """Writes one part of one dataset: a tar per group, the failures, and the commit of both.

    Nothing has its final name before `commit`. Use it in one thread at a time, in the order of the items.
    """

    def __init__(self, store: PartStore, part: int, members: Mapping[ArrayName, str], stores_moments: bool) -> None:
        """Prepare a part whose records have arrays in members of these suffixes (`Manifest.array_members`)."""
        self._store = store
        self._part = part
        self._arrays = tuple(members)
        self._members = members
        self._stores_moments = stores_moments
        self._files = ExitStack()
        self._shards: dict[int, _OpenShard] = {}
        self._failures: list[tuple[int, Failure]] = []
        self._num_incomplete = 0
        store.clear(part)

    def add(self, group: int, record: Record) -> int:
        """Append a record to the shard of its group. Return the number of bytes that it takes."""
        if group not in self._shards:
            stream = self._files.enter_context(atomic_write(self._store.shard_path(self._part, group)))
            self._shards[group] = _OpenShard(stream, ShardWriter(stream, self._arrays, self._members))
        shard = self._shards[group]
        begin = shard.stream.tell()
        shard.writer.add(record)
        self._num_incomplete += record.info.get("incomplete") is not None
        for name in ("latent", "flip"):
            if name in record.arrays:
                shard.statistics.add(record.arrays[name], self._stores_moments)
        return shard.stream.tell() - begin

    def fail(self, position: int, item: Item, reason: str) -> None:
        """List the item at `position` as failed."""
        self._failures.append((position, Failure(key=item.key, path=item.where, reason=reason)))

    def commit(self) -> None:
        """Give the shards their names, then write index rows and record. PomscaleError where the disk is full."""
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
        record = PartRecord(
            shards=tuple(shards), statistics=statistics, failures=failures, num_incomplete=self._num_incomplete
        )
        self._store.commit(self._part, record, np.concatenate(all_rows))

    def abandon(self) -> None:
        """Delete everything that is not committed."""
        # On a full disk closing a file fails once more, after it is gone; only the first error is reported.
        with suppress(PomscaleError):
            self._files.__exit__(InterruptedError, InterruptedError(), None)


def write_index(
    folder: Path, arrays: Sequence[ArrayName], num_rows: int, blocks: Iterable[np.ndarray]
) -> tuple[IndexInfo, str]:
    """Write blocks of rows, `num_rows` in all, one after the other. Return also the sha256 of the key column."""
    keys = hashlib.sha256()
    with atomic_write(folder / INDEX_NAME) as stream:
        stream.write(npy_header((num_rows,), index_dtype(arrays)))
        for rows in blocks:
            keys.update(rows["key"].tobytes())
            stream.write(rows.tobytes())
        num_bytes, sha256 = num_bytes_and_sha256(stream)
    return IndexInfo(num_bytes=num_bytes, sha256=sha256), keys.hexdigest()


def num_bytes_and_sha256(stream: BufferedRandom) -> tuple[int, str]:
    """Return size and sha256 (hex) of all that was written to the stream so far."""
    num_bytes = stream.tell()
    stream.seek(0)
    return num_bytes, hashlib.file_digest(stream, "sha256").hexdigest()
