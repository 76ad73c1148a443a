"""Find, for every record of a dataset, the record of a companion set (text embeddings) that has its key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.shards.equal_keys import sorted_buckets
from data_pipelines.shards.readers import open_checked_index, read_records
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write
from pomscale.shards.class_names import check_companion_classes
from pomscale.shards.index import npy_header
from pomscale.shards.join import NO_ROW, join_path
from pomscale.shards.schema import Manifest, read_manifest

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class JoinReport:
    """Outcome of a join."""

    table: Path | None
    """None where both sets have the same records in the same order, so that no table is needed."""
    num_samples: int
    num_missing: int

    @property
    def exit_code(self) -> int:
        return 3 if self.num_missing else 0

    def __str__(self) -> str:
        if self.table is None:
            return f"both sets have the same {self.num_samples:,} records in the same order: no table is needed"
        text = f"{self.table}: {self.num_samples - self.num_missing:,} of {self.num_samples:,} records have a companion"
        return f"{text}, {self.num_missing:,} have none" if self.num_missing else text


def join(main: str | Path, companion: str | Path) -> JoinReport:
    """Write the table that the loader opens (`pomscale.shards.join`) into the companion's folder.

    Memory does not grow with the number of records. Raises InputError if the sets have different classes, or if the
    keys of two records of one set have the same hash, so that neither can be identified.
    """
    main, companion = Path(main), Path(companion)
    manifest, other = read_manifest(main), read_manifest(companion)
    check_companion_classes(main, manifest, companion, other)
    if manifest.keys_sha256 == other.keys_sha256:
        return JoinReport(None, manifest.num_samples, 0)
    index, other_index = open_checked_index(main, manifest), open_checked_index(companion, other)
    path = join_path(companion, manifest)
    num_missing = 0
    with atomic_write(path) as stream:
        header = npy_header((len(index),), "<i8")
        stream.write(header)
        for begin in range(0, len(index), _ROWS_AT_ONCE):
            stream.write(np.full(min(_ROWS_AT_ONCE, len(index) - begin), NO_ROW, "<i8").tobytes())
        stream.flush()  # the file has all its blocks: writing to the map cannot fail for want of room
        table = np.memmap(stream, "<i8", "r+", offset=len(header), shape=(len(index),))
        for mine, theirs in sorted_buckets([index["key"], other_index["key"]]):
            _refuse_equal_hashes(main, manifest, index, mine)
            _refuse_equal_hashes(companion, other, other_index, theirs)
            nearest = np.searchsorted(theirs["key"], mine["key"])
            found = np.zeros(len(mine), bool)
            inside = nearest < len(theirs)
            found[inside] = theirs["key"][nearest[inside]] == mine["key"][inside]
            table[mine["row"][found]] = theirs["row"][nearest[found]]
            num_missing += int((~found).sum())
        table.flush()
    return JoinReport(path, len(index), num_missing)


def _refuse_equal_hashes(folder: Path, manifest: Manifest, index: np.ndarray, bucket: np.ndarray) -> None:
    same = np.flatnonzero(bucket["key"][1:] == bucket["key"][:-1])
    if len(same):
        rows = index[bucket["row"][[same[0], same[0] + 1]]]
        keys = " and ".join(record.key for record in read_records(folder, manifest, rows))
        raise InputError(f"join: {folder}: two records have keys of the same hash, {keys}; encode one of them without")
