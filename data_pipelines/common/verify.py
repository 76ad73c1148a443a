"""Proof that a dataset is whole: every shard and every record against manifest, index and source."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from data_pipelines.common.items import ItemTable
from data_pipelines.common.keys import equal_keys, sorted_buckets
from data_pipelines.common.records import TarReader, TarRecord, open_shard, read_record, required_suffixes, stored_array
from data_pipelines.common.workers import over_shards
from pomscale.data.index import NO_LABEL, index_dtype, key_hash, map_index
from pomscale.data.schema import (
    ARRAY_MEMBERS,
    CAPTION_MEMBER,
    CLASS_MEMBER,
    FAILURES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    REMEDY,
    IndexInfo,
    Manifest,
    ShardInfo,
    TextInfo,
    read_manifest,
)
from pomscale.errors import PomscaleError

# A set that is damaged all over must not fill the memory with lines that nobody reads.
_MAX_LINES = 1000
_MAX_MISSING_NAMED = 20
_PARTS_FOLDER = "parts"
_ROWS_AT_ONCE = 1 << 20


@dataclass
class Problems:
    """One line each; the first _MAX_LINES are kept, all are counted."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, lines: Iterable[str], count: int | None = None) -> bool:
        """Whether there were any. `count`: how many `lines` stands for."""
        lines = list(lines)
        self.lines += lines[: _MAX_LINES - len(self.lines)]
        self.count += len(lines) if count is None else count
        return bool(lines)


@dataclass(frozen=True)
class VerifyReport:
    """`problems`: one line each, naming shard and key; the first 1,000 of `num_problems`. None = the dataset is whole.

    `bad_shards`: those to be made anew, in the manifest's order.
    """

    folder: Path
    num_samples: int
    num_shards: int
    problems: list[str]
    num_problems: int
    bad_shards: list[str]

    @property
    def exit_code(self) -> int:
        return 1 if self.num_problems else 0

    def __str__(self) -> str:
        checked = f"{self.folder}: {self.num_samples:,} samples in {self.num_shards:,} shards"
        if not self.num_problems:
            return f"{checked}: whole"
        more = self.num_problems - len(self.problems)
        told = [*self.problems, *([f"... and {more:,} more"] if more else [])]
        return "\n".join([*told, f"{checked}: {self.num_problems:,} problems; {REMEDY}"])


def verify(
    folder: str | Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
    only: Collection[str] | None = None,
) -> VerifyReport:
    """Reads every byte of the dataset once, in `num_workers` processes (default: the cores it may use).

    Memory does not grow with the number of records: keys are compared on disk. only: just these shards, without what
    concerns the set as a whole (keys that are there twice, items of the source that are missing).
    InputError if there is no manifest to hold it against.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = Problems()
    index = None
    # A damaged index is made anew by the next encode; it says nothing about the shards.
    if not problems.add(_check_index(folder, manifest)):
        index = map_index(folder / INDEX_NAME, manifest.num_samples, index_dtype(manifest.arrays))
    problems.add(_check_null_embedding(manifest.text))
    problems.add(_check_listing(folder, manifest))
    numbers = [i for i, shard in enumerate(manifest.shards) if only is None or shard.name in only]
    bad: set[int] = set()
    with ExitStack() as files:
        found = _FoundRows(manifest, files) if index is None and only is None else None
        for number, shard in zip(
            numbers, _check_shards(folder, manifest, index is not None, numbers, num_workers, progress), strict=True
        ):
            if problems.add(shard.problems.lines, shard.problems.count):
                bad.add(number)
            if found is not None:
                found.add(shard.rows)
        if only is None:
            rows = index if found is None else found.map()
            for number, line in _find_duplicates(folder, manifest, rows):
                problems.add([line])
                bad.add(number)
            _check_source(folder, manifest, rows, problems)
    return VerifyReport(
        folder=folder,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        problems=problems.lines,
        num_problems=problems.count,
        bad_shards=[manifest.shards[number].name for number in sorted(bad)],
    )


# The index and the manifest itself


def _check_index(folder: Path, manifest: Manifest) -> Iterator[str]:
    path = folder / INDEX_NAME
    try:
        problem = _check_bytes(path, manifest.index)
        if problem:
            yield f"{INDEX_NAME}: {problem}"
            return
        index = map_index(path, manifest.num_samples, index_dtype(manifest.arrays))
    except (OSError, ValueError) as error:
        yield f"{INDEX_NAME}: cannot be read: {error}"
        return
    keys = hashlib.sha256()
    for begin in range(0, len(index), _ROWS_AT_ONCE):
        rows = index[begin : begin + _ROWS_AT_ONCE]
        keys.update(np.ascontiguousarray(rows["key"]))
        if rows["shard"].min() < 0 or rows["shard"].max() >= len(manifest.shards):
            yield f"{INDEX_NAME}: names a shard that is not in the manifest"
            return
    if keys.hexdigest() != manifest.keys_sha256:
        yield f"{MANIFEST_NAME}: keys_sha256 is not that of {INDEX_NAME}"


def _check_bytes(path: Path, expected: IndexInfo) -> str | None:
    num_bytes = path.stat().st_size
    if num_bytes != expected.num_bytes:
        return _wrong_size(num_bytes, expected)
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected.sha256:
            return _WRONG_SHA256
    return None


_WRONG_SHA256 = "its sha256 differs from the manifest's"


def _wrong_size(num_bytes: int, expected: ShardInfo | IndexInfo) -> str:
    return f"has {num_bytes:,} bytes instead of {expected.num_bytes:,}: cut off or overwritten"


def _check_null_embedding(text: TextInfo | None) -> Iterator[str]:
    if text is None:
        return
    try:
        values = np.frombuffer(text.null_bytes, "<f2")
    except ValueError as error:  # not base64, or half a number
        yield f"{MANIFEST_NAME}: text.null_embedding: {error}"
        return
    if not 1 <= text.null_length <= text.config.max_length or len(values) != text.null_length * text.dim:
        yield f"{MANIFEST_NAME}: text.null_embedding is not of shape {(text.null_length, text.dim)}"
    elif not _is_finite(values):
        yield f"{MANIFEST_NAME}: text.null_embedding holds a value that is not finite"


def _check_listing(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path.name}: is not in the manifest"


# One shard, in a process of its own


@dataclass(frozen=True, slots=True)
class _Shard:
    """A task: shard number and its rows of the index, begin and end; none if the index is damaged."""

    number: int
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class _CheckedShard:
    """`rows`: what the shard itself says; kept only where the index does not say it."""

    problems: Problems
    rows: np.ndarray


def _check_shards(
    folder: Path, manifest: Manifest, has_index: bool, numbers: list[int], num_workers: int | None, progress: bool
) -> Iterator[_CheckedShard]:
    ends = list(accumulate((shard.num_samples for shard in manifest.shards), initial=0))
    return over_shards(
        partial(_check_shard, folder, manifest),
        [_Shard(number, (ends[number], ends[number + 1]) if has_index else None) for number in numbers],
        [manifest.shards[number].num_bytes for number in numbers],
        label="verify",
        num_workers=num_workers,
        progress=progress,
    )


def _check_shard(folder: Path, manifest: Manifest, task: _Shard) -> _CheckedShard:
    shard = manifest.shards[task.number]
    problems = Problems()
    keys: list[str] = []
    found: list[tuple[int, ...]] = []
    dtype = index_dtype(manifest.arrays)
    digest = hashlib.sha256()
    try:
        with open_shard(folder / shard.name) as stream:
            reader = TarReader(stream, digest)
            for record in reader:
                label = _label(record)
                problems.add(_check_record(manifest, shard.group, record, label))
                keys.append(record.key)
                found.append(record.row(task.number, NO_LABEL if label is None else label, manifest.arrays))
            problems.add(reader.damages)
            num_bytes = stream.tell()
    except FileNotFoundError:
        problems.add(["is missing"])
        return _CheckedShard(_named(shard, problems), np.empty(0, dtype))
    except OSError as error:
        problems.add([f"cannot be read: {error}"])
        return _CheckedShard(_named(shard, problems), np.array(found, dtype))
    rows = np.array(found, dtype)
    if len(rows) != shard.num_samples:
        last = keys[-1] if keys else "none"
        problems.add([f"{len(rows):,} readable records instead of {shard.num_samples:,}, last key {last}"])
    if task.rows is not None:
        index = map_index(folder / INDEX_NAME, manifest.num_samples, dtype)[slice(*task.rows)]
        problems.add(_compare_with_index(keys, rows, index))
    if num_bytes != shard.num_bytes:
        problems.add([_wrong_size(num_bytes, shard)])
    elif digest.hexdigest() != shard.sha256:
        # Arrays and classes are held against the index; nothing else in a shard has a checksum of its own.
        where = "" if problems.count or task.rows is None else "; the damage is in a caption or in a .json member"
        problems.add([_WRONG_SHA256 + where])
    return _CheckedShard(_named(shard, problems), np.empty(0, dtype) if task.rows else rows)


def _named(shard: ShardInfo, problems: Problems) -> Problems:
    return Problems([f"{shard.name}: {line}" for line in problems.lines], problems.count)


def _label(record: TarRecord) -> int | None:
    """None if the member with the class holds none."""
    try:
        return record.label()
    except ValueError:
        return None


def _check_record(manifest: Manifest, group: int, record: TarRecord, label: int | None) -> Iterator[str]:
    required = required_suffixes(manifest)
    for suffix in required:
        if suffix not in record.members:
            yield f"{record.key}{suffix}: is missing"
    for suffix in record.members:
        if suffix not in required:
            yield f"{record.key}{suffix}: does not belong here"
    if CLASS_MEMBER in record.members and CLASS_MEMBER in required and (label is None or label >= manifest.num_classes):
        text = bytes(record.payload(CLASS_MEMBER)[:20]).decode(errors="backslashreplace")
        yield f"{record.key}: class {text} is not among the {manifest.num_classes} classes"
    if CAPTION_MEMBER in record.members:
        try:
            str(record.payload(CAPTION_MEMBER), "utf-8")
        except UnicodeDecodeError:
            yield f"{record.key}{CAPTION_MEMBER}: is not UTF-8"
    for array in manifest.arrays:
        suffix = ARRAY_MEMBERS[array]
        if suffix not in record.members:
            continue
        try:
            if not _is_finite(stored_array(manifest, group, array, record.payload(suffix))):
                yield f"{record.key}{suffix}: holds a value that is not finite"
        except ValueError as error:
            yield f"{record.key}{suffix}: {error}"


def _is_finite(values: np.ndarray) -> bool:
    """np.isfinite(values).all() of float16, at ten times its speed: infinities and NaN have all bits of the exponent."""
    return not values.size or int((values.view("<u2") & 0x7FFF).max()) < 0x7C00


def _compare_with_index(keys: list[str], found: np.ndarray, index: np.ndarray) -> Iterator[str]:
    numbers = np.arange(len(found))
    if len(found) != len(index):  # records were lost: compare those that are there
        _, numbers, places = np.intersect1d(found["key"], index["key"], return_indices=True)
        found, index = found[numbers], index[places]
    for i in np.flatnonzero(found != index):
        fields = [name for name in index.dtype.names or () if found[i][name] != index[i][name]]
        yield f"{keys[numbers[i]]}: {', '.join(fields)} differ from {INDEX_NAME}"


# The set as a whole


class _FoundRows:
    """Stands in for a damaged index: what the shards themselves say, in a temporary file."""

    def __init__(self, manifest: Manifest, files: ExitStack) -> None:
        self._file = files.enter_context(tempfile.TemporaryFile())
        self._dtype = index_dtype(manifest.arrays)

    def add(self, rows: np.ndarray) -> None:
        self._file.write(rows.tobytes())

    def map(self) -> np.ndarray:
        self._file.flush()
        if not self._file.tell():
            return np.empty(0, self._dtype)
        return np.memmap(self._file, self._dtype, "r")


def _find_duplicates(folder: Path, manifest: Manifest, rows: np.ndarray) -> Iterator[tuple[int, str]]:
    """Shard number and line of every record whose key an earlier one has."""
    for first, second in equal_keys(rows["key"]):
        shards = [manifest.shards[rows[row]["shard"]].name for row in (first, second)]
        try:
            keys = [read_record(folder, manifest, rows[row]).key for row in (first, second)]
        except PomscaleError:
            continue  # the shard is damaged there, which is told
        what = "is also a key of" if keys[0] == keys[1] else f"has the 64-bit hash of {keys[0]} in"
        yield int(rows[second]["shard"]), f"{shards[1]}: {keys[1]}: {what} {shards[0]}"


def _check_source(folder: Path, manifest: Manifest, rows: np.ndarray, problems: Problems) -> None:
    """Every item of the source is a record, or listed as failed."""
    source = manifest.source
    if manifest.num_samples + manifest.num_failures != source.num_items:
        problems.add(
            [
                f"{MANIFEST_NAME}: {manifest.num_samples:,} samples and {manifest.num_failures:,} failures are not the "
                f"{source.num_items:,} items of the source"
            ]
        )
    with ExitStack() as files:
        failed = _failed_keys(folder, manifest, problems, files)
        table = _item_table(folder, manifest)
        if table is None:
            return
        missing = _missing_items(table.key_hashes(), rows["key"], failed)
        named = list(islice(missing, _MAX_MISSING_NAMED))
        problems.add(
            f"{table[item].key}: is neither in a shard nor in {FAILURES_NAME} ({table[item].where})" for item in named
        )
        num_more = sum(1 for _ in missing)
        if num_more:
            problems.add([f"{num_more:,} more items are neither in a shard nor in {FAILURES_NAME}"], num_more)


def _failed_keys(folder: Path, manifest: Manifest, problems: Problems, files: ExitStack) -> np.ndarray:
    """Hashes of the keys in failures.jsonl, which must be as many as the manifest says."""
    if not manifest.num_failures:
        return np.empty(0, "<u8")
    file = files.enter_context(tempfile.TemporaryFile())
    num_failures = 0
    try:
        with (folder / FAILURES_NAME).open("rb") as stream:
            for line in stream:
                file.write(np.uint64(key_hash(json.loads(line)["key"])).tobytes())
                num_failures += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.add([f"{FAILURES_NAME}: line {num_failures + 1:,} cannot be read: {error}"])
    if num_failures != manifest.num_failures:
        problems.add([f"{FAILURES_NAME}: lists {num_failures:,} failures, the manifest {manifest.num_failures:,}"])
    file.flush()
    return np.memmap(file, "<u8", "r") if num_failures else np.empty(0, "<u8")


def _item_table(folder: Path, manifest: Manifest) -> ItemTable | None:
    """The list that the encoder keeps of its source, where it is still there; with several sizes it is one folder up."""
    for parent in (folder, folder.parent):
        table = ItemTable.open(parent / _PARTS_FOLDER)
        if table is not None and table.fingerprint == manifest.source.fingerprint:
            return table
    return None


def _missing_items(items: np.ndarray, encoded: np.ndarray, failed: np.ndarray) -> Iterator[int]:
    for mine, *present in sorted_buckets([items, encoded, failed]):
        yield from mine["row"][~np.isin(mine["key"], np.concatenate([rows["key"] for rows in present]))].tolist()
