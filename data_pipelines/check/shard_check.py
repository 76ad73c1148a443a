"""Check one shard against the manifest and its rows of the index, in a process of its own, reading each byte once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.shards.finite import is_finite
from data_pipelines.shards.readers import TarReader, TarRecord, open_shard, required_suffixes, stored_array
from pomscale.shards.index import NO_LABEL, index_dtype, map_index
from pomscale.shards.schema import (
    ARRAY_MEMBERS,
    CAPTION_MEMBER,
    CLASS_MEMBER,
    INDEX_NAME,
    IndexInfo,
    Manifest,
    ShardInfo,
)

# A set that is damaged all over must not fill the memory with lines.
_MAX_LINES = 1000

WRONG_SHA256 = "its sha256 differs from the manifest's"


@dataclass
class Problems:
    """Problems, one line each; the first _MAX_LINES are kept, all are counted."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, lines: Iterable[str], count: int | None = None) -> bool:
        """Add lines, which stand for `count` problems (default: one each). Return whether there were any."""
        lines = list(lines)
        self.lines += lines[: _MAX_LINES - len(self.lines)]
        self.count += len(lines) if count is None else count
        return bool(lines)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to check."""

    number: int
    rows: tuple[int, int] | None
    """Begin and end of its rows in the index; None if the index is damaged."""


@dataclass(frozen=True)
class CheckedShard:
    """Outcome of the check of one shard."""

    problems: Problems
    rows: np.ndarray
    """Index rows that the shard's records call for; empty where there is an index."""


def check_shard(folder: Path, manifest: Manifest, task: ShardTask) -> CheckedShard:
    """Read a shard and return its problems."""
    shard = manifest.shards[task.number]
    problems = Problems()
    keys: list[str] = []
    found: list[tuple[int, ...]] = []
    dtype = index_dtype(manifest.arrays)
    digest = hashlib.sha256()
    members = manifest.array_members
    try:
        with open_shard(folder / shard.name) as stream:
            reader = TarReader(stream, digest)
            for record in reader:
                label = _label(record)
                problems.add(_check_record(manifest, shard.group, record, label))
                keys.append(record.key)
                found.append(record.row(task.number, NO_LABEL if label is None else label, members))
            problems.add(reader.damages)
            num_bytes = stream.tell()
    except FileNotFoundError:
        problems.add(["is missing"])
        return CheckedShard(_named(shard, problems), np.empty(0, dtype))
    except OSError as error:
        problems.add([f"cannot be read: {error}"])
        return CheckedShard(_named(shard, problems), np.array(found, dtype))
    rows = np.array(found, dtype)
    if len(rows) != shard.num_samples:
        last = keys[-1] if keys else "none"
        problems.add([f"{len(rows):,} readable records instead of {shard.num_samples:,}, last key {last}"])
    if task.rows is not None:
        index = map_index(folder / INDEX_NAME, manifest.num_samples, dtype)[slice(*task.rows)]
        problems.add(_compare_with_index(keys, rows, index))
    if num_bytes != shard.num_bytes:
        problems.add([wrong_size(num_bytes, shard)])
    elif digest.hexdigest() != shard.sha256:
        problems.add([WRONG_SHA256])
    return CheckedShard(_named(shard, problems), np.empty(0, dtype) if task.rows else rows)


def wrong_size(num_bytes: int, expected: ShardInfo | IndexInfo) -> str:
    """Return the problem of a file whose size is not the manifest's."""
    return f"has {num_bytes:,} bytes instead of {expected.num_bytes:,}: cut off or overwritten"


def _named(shard: ShardInfo, problems: Problems) -> Problems:
    return Problems([f"{shard.name}: {line}" for line in problems.lines], problems.count)


def _label(record: TarRecord) -> int | None:
    """Return the class of a record; None if the member with the class holds none."""
    try:
        return record.label()
    except ValueError:
        return None


def _check_record(manifest: Manifest, group: int, record: TarRecord, label: int | None) -> Iterator[str]:
    required = required_suffixes(manifest)
    yield from _check_members(manifest, record, required)
    if CLASS_MEMBER in record.members and CLASS_MEMBER in required and (label is None or label >= manifest.num_classes):
        text = bytes(record.payload(CLASS_MEMBER)[:20]).decode(errors="backslashreplace")
        yield f"{record.key}: class {text} is not among the {manifest.num_classes} classes"
    if CAPTION_MEMBER in record.members:
        try:
            str(record.payload(CAPTION_MEMBER), "utf-8")
        except UnicodeDecodeError:
            yield f"{record.key}{CAPTION_MEMBER}: is not UTF-8"
    for array, suffix in manifest.array_members.items():
        if suffix not in record.members:
            continue
        try:
            if not is_finite(stored_array(manifest, group, array, record.payload(suffix))):
                yield f"{record.key}{suffix}: holds a value that is not finite"
        except ValueError as error:
            yield f"{record.key}{suffix}: {error}"


def _check_members(manifest: Manifest, record: TarRecord, required: tuple[str, ...]) -> Iterator[str]:
    """Yield the members that are missing, or do not belong to a record."""
    by_encoder = [[ARRAY_MEMBERS[array] for array in arrays] for arrays in manifest.arrays_by_encoder]
    texts = [suffix for suffixes in by_encoder for suffix in suffixes]
    num_texts = max((sum(suffix in record.members for suffix in suffixes) for suffixes in by_encoder), default=0)
    of_captions = [suffix for suffixes in by_encoder for suffix in suffixes[:num_texts]]
    for suffix in dict.fromkeys([*required, *of_captions]):  # texts are those of the first captions
        if suffix not in record.members:
            yield f"{record.key}{suffix}: is missing"
    for suffix in record.members:
        if suffix not in required and suffix not in texts:
            yield f"{record.key}{suffix}: does not belong here"
    if num_texts > 1:
        try:
            num_captions = len(record.captions())
        except ValueError as error:
            yield f"{record.key}: its captions cannot be read: {error}"
            return
        if num_captions != num_texts:
            yield f"{record.key}: has {num_texts} text embeddings of {num_captions} captions"


def _compare_with_index(keys: list[str], found: np.ndarray, index: np.ndarray) -> Iterator[str]:
    numbers = np.arange(len(found))
    if len(found) != len(index):  # records were lost: compare those that are there
        _, numbers, rows = np.intersect1d(found["key"], index["key"], return_indices=True)
        found, index = found[numbers], index[rows]
    for i in np.flatnonzero(found != index):
        fields = [name for name in index.dtype.names or () if found[i][name] != index[i][name]]
        yield f"{keys[numbers[i]]}: {', '.join(fields)} differ from {INDEX_NAME}"
