"""Verify that a dataset is whole: check every shard and every record against manifest, index and source."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_pipelines.check.shard_check import (
    WRONG_SHA256,
    CheckedShard,
    Problems,
    ShardTask,
    check_shard,
    wrong_size,
)
from data_pipelines.check.source_check import check_source
from data_pipelines.shards.equal_keys import equal_keys
from data_pipelines.shards.finite import is_finite
from data_pipelines.shards.parts import skipped_exit_code
from data_pipelines.shards.readers import read_records
from data_pipelines.shards.workers import over_shards
from pomscale.base.errors import PomscaleError
from pomscale.shards.index import index_dtype, map_index
from pomscale.shards.schema import (
    FAILURES_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    REMEDY,
    IndexInfo,
    Manifest,
    TextInfo,
    read_manifest,
)

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a verification. A dataset without problems is whole."""

    folder: Path
    num_samples: int
    num_shards: int
    problems: list[str]
    """One line each, naming shard and key; the first 1,000 of `num_problems`."""
    num_problems: int
    bad_shards: list[str]
    """Shards to be made again, in the manifest's order."""
    num_incomplete: int
    """Clips that end early and were kept."""
    num_skipped: int
    """Items that the encode could not encode."""
    max_skipped: int
    """Skipped items that the recipe allows."""

    @property
    def exit_code(self) -> int:
        return 1 if self.num_problems else skipped_exit_code(self.num_skipped, self.max_skipped)

    def __str__(self) -> str:
        checked = f"{self.folder}: {self.num_samples:,} samples in {self.num_shards:,} shards"
        if not self.num_problems:
            skipped = f"; {self.num_skipped:,} items were skipped, listed in {self.folder / FAILURES_NAME}"
            kept = f"; {self.num_incomplete:,} clips that end early were kept"
            return f"{checked}: whole{skipped if self.num_skipped else ''}{kept if self.num_incomplete else ''}"
        more = self.num_problems - len(self.problems)
        lines = [*self.problems, *([f"... and {more:,} more"] if more else [])]
        return "\n".join([*lines, f"{checked}: {self.num_problems:,} problems; {REMEDY}"])


def verify(
    folder: str | Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
    only: Collection[str] | None = None,
) -> VerifyReport:
    """Read every byte of the dataset once and return its problems.

    Memory does not grow with the number of records: keys are compared on disk. Raises InputError if there is no
    manifest.

    Args:
        folder: The dataset.
        num_workers: Number of processes; None for as many as there are cores and the data is worth.
        progress: Show progress on stderr.
        only: Names of the shards to check; the checks of the set as a whole (keys that occur twice, items of the source
            that are missing) are then left out.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = Problems()
    # A damaged index says nothing about the shards; the next encode writes it again.
    has_index = not problems.add(_check_index(folder, manifest))
    problems.add(_check_null_embedding(manifest.text))
    problems.add(_check_listing(folder, manifest))
    numbers = [i for i, shard in enumerate(manifest.shards) if only is None or shard.name in only]
    bad: set[int] = set()
    with _Rows(folder, manifest, has_index) as rows:
        checked = _check_shards(folder, manifest, has_index, numbers, num_workers, progress)
        for number, shard in zip(numbers, checked, strict=True):
            if problems.add(shard.problems.lines, shard.problems.count):
                bad.add(number)
            rows.add(shard.rows)
        if only is None:
            for number, line in _find_duplicates(folder, manifest, rows.all()):
                problems.add([line])
                bad.add(number)
            check_source(folder, manifest, rows.all()["key"], problems)
    return VerifyReport(
        folder=folder,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        problems=problems.lines,
        num_problems=problems.count,
        bad_shards=[manifest.shards[number].name for number in sorted(bad)],
        num_incomplete=manifest.num_incomplete,
        num_skipped=manifest.num_failures,
        max_skipped=manifest.max_skipped,
    )


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
        keys.update(rows["key"].tobytes())
        if rows["shard"].min() < 0 or rows["shard"].max() >= len(manifest.shards):
            yield f"{INDEX_NAME}: names a shard that is not in the manifest"
            return
    if keys.hexdigest() != manifest.keys_sha256:
        yield f"{MANIFEST_NAME}: keys_sha256 is not that of {INDEX_NAME}"


def _check_bytes(path: Path, expected: IndexInfo) -> str | None:
    num_bytes = path.stat().st_size
    if num_bytes != expected.num_bytes:
        return wrong_size(num_bytes, expected)
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected.sha256:
            return WRONG_SHA256
    return None


def _check_null_embedding(text: TextInfo | None) -> Iterator[str]:
    """Check the values of the null embedding; its shape was checked when the manifest was read."""
    for encoder in () if text is None else text.encoders:
        if not is_finite(np.frombuffer(encoder.null_bytes, "<f2")):
            yield f"{MANIFEST_NAME}: text.null_embedding holds a value that is not finite"


def _check_listing(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path.name}: is not in the manifest"


def _check_shards(
    folder: Path, manifest: Manifest, has_index: bool, numbers: list[int], num_workers: int | None, progress: bool
) -> Iterator[CheckedShard]:
    ends = list(accumulate((shard.num_samples for shard in manifest.shards), initial=0))
    return over_shards(
        partial(check_shard, folder, manifest),
        [ShardTask(number, (ends[number], ends[number + 1]) if has_index else None) for number in numbers],
        [manifest.shards[number].num_bytes for number in numbers],
        label="verify",
        num_workers=num_workers,
        progress=progress,
    )


class _Rows:
    """The rows of the whole set: the index, or, where that is damaged, the rows of the shards in a temporary file."""

    def __init__(self, folder: Path, manifest: Manifest, has_index: bool) -> None:
        self._dtype = index_dtype(manifest.arrays)
        self._index = map_index(folder / INDEX_NAME, manifest.num_samples, self._dtype) if has_index else None
        self._files = ExitStack()
        self._file = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  closed with the stack

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def add(self, rows: np.ndarray) -> None:
        """Add the rows of a shard; none where there is an index."""
        self._file.write(rows.tobytes())

    def all(self) -> np.ndarray:
        """Return all rows, memory-mapped, to be used while the block lasts."""
        if self._index is not None:
            return self._index
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r") if self._file.tell() else np.empty(0, self._dtype)


def _find_duplicates(folder: Path, manifest: Manifest, rows: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield shard number and line of every record whose key an earlier one has."""
    for first, second in equal_keys(rows["key"]):
        shards = [manifest.shards[rows[row]["shard"]].name for row in (first, second)]
        try:
            keys = [record.key for record in read_records(folder, manifest, rows[[first, second]])]
        except PomscaleError:
            continue  # the shard is damaged there, which is reported
        what = "is also a key of" if keys[0] == keys[1] else f"has the 64-bit hash of {keys[0]} in"
        yield int(rows[second]["shard"]), f"{shards[1]}: {keys[1]}: {what} {shards[0]}"
