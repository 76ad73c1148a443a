"""Split a dataset into several without a record in common, e.g. one to train on and one held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.derive.new_dataset import new_dataset, origin_of
from data_pipelines.shards.readers import TarRecord, failure_lines, open_checked_index, read_records, stored_array
from data_pipelines.shards.statistics import ChannelStatistics, RunningStatistics
from data_pipelines.shards.workers import over_shards
from data_pipelines.shards.writers import num_bytes_and_sha256, tar_end, write_index
from pomscale import __version__
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, write_text
from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.shards.index import index_dtype, key_hash, map_index
from pomscale.shards.schema import (
    FAILURES_NAME,
    INDEX_NAME,
    INFO_MEMBER,
    MANIFEST_NAME,
    REMEDY,
    IndexInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    read_manifest,
)

# Subindex of Stream.DATASET; the encoder uses 1, `show` 2.
_DEAL = 3
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class SplitPart:
    """One of the datasets that a split made."""

    output: Path
    num_samples: int
    num_shards: int
    class_counts: tuple[int, ...]
    """Samples of each class; () without classes."""


@dataclass(frozen=True)
class SplitReport:
    """Outcome of a split."""

    folder: Path
    num_samples: int
    class_names: tuple[str, ...]
    parts: tuple[SplitPart, ...]

    def __str__(self) -> str:
        lines = [
            f"{part.output}: {part.num_samples:,} samples ({part.num_samples / self.num_samples:.2%}) "
            f"in {part.num_shards:,} shards{_balance(part)}"
            for part in self.parts
        ]
        return "\n".join(lines)


def _balance(part: SplitPart) -> str:
    if not part.class_counts:
        return ""
    least, middle, most = np.percentile(part.class_counts, [0, 50, 100])
    without = sum(count == 0 for count in part.class_counts)
    text = f"; samples per class: {least:,.0f} to {most:,.0f}, median {middle:,.0f}"
    return text + (f", {without:,} classes have none" if without else "")


@dataclass(frozen=True)
class _Share:
    """One output, and the interval [begin, end) of [0, 1) in which its records' numbers lie."""

    output: Path
    begin: float
    end: float
    seed: int

    def chosen(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys (n,) uint64 belong to this output, bool (n,). Depends on key and seed alone."""
        numbers = keyed_uniforms(self.seed, Stream.DATASET, keys, _DEAL)
        return (self.begin <= numbers) & (numbers < self.end)


def split(
    folder: str | Path,
    outputs: Mapping[str | Path, float],
    *,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> SplitReport:
    """Deal the records of a dataset to several outputs.

    Key, seed and shares decide which output gets a record, so it stays in that output when the dataset grows. Members
    are copied byte for byte, arrays compared with their checksums, statistics measured again. A split that was killed
    may be repeated.

    Args:
        folder: The dataset.
        outputs: Share of the records by folder; shares add up to 1.
        seed: Seed of the draw.
        num_workers: Number of processes; None for as many as there are cores and the data is worth.
        progress: Show progress on stderr.

    Raises:
        InputError: The shares do not add up to 1, an output would be empty, or its folder holds something else.
        PomscaleError: The dataset is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = open_checked_index(folder, manifest)
    shares = _shares(outputs, seed)
    cuts = [_cut(manifest, index, share) for share in shares]
    for share, shards in zip(shares, cuts, strict=True):
        if not shards:
            raise InputError(f"split: {share.output} would get none of the {manifest.num_samples:,} samples")
    with ExitStack() as outputs_at_work:
        for share in shares:  # all are checked before any is filled
            outputs_at_work.enter_context(new_dataset(share.output, _recipe(folder, manifest, share)))
        parts = [
            _write_output(folder, manifest, share, shards, num_workers, progress)
            for share, shards in zip(shares, cuts, strict=True)
        ]
    return SplitReport(folder, manifest.num_samples, manifest.class_names, tuple(parts))


def _shares(outputs: Mapping[str | Path, float], seed: int) -> list[_Share]:
    if len({Path(path).resolve() for path in outputs}) < len(outputs) or len(outputs) < 2:
        raise InputError("split: name at least two different outputs, as PATH=SHARE")
    values = list(outputs.values())
    if min(values) <= 0 or abs(sum(values) - 1) > 1e-9:
        raise InputError(f"split: the shares {', '.join(f'{value:g}' for value in values)} do not add up to 1")
    ends = [0.0, *np.cumsum(values).tolist()]
    ends[-1] = 1.0
    return [_Share(Path(path), ends[i], ends[i + 1], seed) for i, path in enumerate(outputs)]


@dataclass(frozen=True)
class _Cut:
    """One shard to be written, of those rows from begin to end of the index that belong to the output."""

    name: str
    group: int
    begin: int
    end: int
    num_samples: int
    num_bytes: int  # an estimate


def _cut(manifest: Manifest, index: np.ndarray, share: _Share) -> list[_Cut]:
    """Return the shards of an output, as large as those of the dataset, each of one group."""
    most = max(shard.num_samples for shard in manifest.shards)
    per_sample = sum(shard.num_bytes for shard in manifest.shards) // manifest.num_samples
    cuts: list[_Cut] = []
    for group, (first, last) in _group_rows(manifest).items():
        begin, count = first, 0  # of the shard that is being filled
        ends: list[tuple[int, int]] = []
        for block in range(first, last, _ROWS_AT_ONCE):
            keys = index["key"][block : min(block + _ROWS_AT_ONCE, last)]
            rows = block + np.flatnonzero(share.chosen(keys))
            ends += [(int(row) + 1, most) for row in rows[most - 1 - count :: most]]
            count = (count + len(rows)) % most
        for end, num_samples in [*ends, *([(last, count)] if count else [])]:
            name = f"shard-{len(cuts):06d}.tar"
            cuts.append(_Cut(name, group, begin, end, num_samples, num_samples * per_sample))
            begin = end
    return cuts


def _group_rows(manifest: Manifest) -> dict[int, tuple[int, int]]:
    """Return first row and end of each group; shards are sorted by group."""
    rows: dict[int, tuple[int, int]] = {}
    end = 0
    for shard in manifest.shards:
        begin, _ = rows.get(shard.group, (end, end))
        end += shard.num_samples
        rows[shard.group] = begin, end
    return rows


def _write_output(
    folder: Path, manifest: Manifest, share: _Share, cuts: list[_Cut], num_workers: int | None, progress: bool
) -> SplitPart:
    written = over_shards(
        partial(_write_shard, folder, manifest, share),
        cuts,
        [cut.num_bytes for cut in cuts],
        label=f"split {share.output.name}",
        num_workers=num_workers,
        progress=progress,
    )
    part = _Output(manifest)
    num_samples = sum(cut.num_samples for cut in cuts)
    index, keys_sha256 = write_index(share.output, manifest.arrays, num_samples, part.collect(written))
    num_failures = _write_failures(folder, manifest, share)
    made = part.manifest(index, keys_sha256, num_failures, _recipe(folder, manifest, share))
    write_text(share.output / MANIFEST_NAME, made.model_dump_json(indent=2))
    return SplitPart(share.output, num_samples, len(cuts), tuple(part.class_counts.tolist()))


def _recipe(folder: Path, manifest: Manifest, share: _Share) -> dict[str, Any]:
    """Return the recipe of an output. Its share of the records begins at `begin` in [0, 1)."""
    return {
        "kind": "split",
        "of": [origin_of(folder, manifest)],
        "share": share.end - share.begin,
        "begin": share.begin,
        "seed": share.seed,
    }


@dataclass(frozen=True)
class _Written:
    """A shard that was written."""

    info: ShardInfo
    rows: np.ndarray
    statistics: ChannelStatistics | None
    num_incomplete: int


class _Output:
    """Collects the shards of an output, one after the other, for its manifest."""

    def __init__(self, of: Manifest) -> None:
        self._of = of
        self._shards: list[ShardInfo] = []
        self._statistics: ChannelStatistics | None = None
        self._num_incomplete = 0
        self.class_counts = np.zeros(of.num_classes, np.int64)

    def collect(self, written: Iterator[_Written]) -> Iterator[np.ndarray]:
        """Collect each shard, and yield its index rows."""
        for one in written:
            one.rows["shard"] = len(self._shards)
            self._shards.append(one.info)
            self._num_incomplete += one.num_incomplete
            if one.statistics is not None:
                mine = self._statistics
                self._statistics = one.statistics if mine is None else mine.merge(one.statistics)
            if len(self.class_counts):
                self.class_counts += np.bincount(one.rows["label"], minlength=len(self.class_counts))[
                    : len(self.class_counts)
                ]
            yield one.rows

    def manifest(self, index: IndexInfo, keys_sha256: str, num_failures: int, recipe: dict[str, Any]) -> Manifest:
        latent, statistics = self._of.latent, self._statistics
        if latent is not None and statistics is not None:
            latent = latent.model_copy(
                update={"num_values": statistics.count, "mean": statistics.mean, "std": statistics.std}
            )
        num_samples = sum(shard.num_samples for shard in self._shards)
        of = f"{self._of.source.fingerprint} {recipe['begin']} {recipe['share']} {recipe['seed']}"
        return self._of.model_copy(
            update={
                "pomscale_version": __version__,
                "latent": latent,
                "num_samples": num_samples,
                "num_failures": num_failures,
                "num_incomplete": self._num_incomplete,
                "source": SourceInfo(
                    fingerprint=hashlib.sha256(of.encode()).hexdigest(), num_items=num_samples + num_failures
                ),
                "shards": tuple(self._shards),
                "keys_sha256": keys_sha256,
                "index": index,
                "recipe": recipe,
            }
        )


def _write_failures(folder: Path, manifest: Manifest, share: _Share) -> int:
    """Write the failures of an output, which are dealt by their keys as records are. Return their number."""
    num_failures = 0
    path = share.output / FAILURES_NAME
    with atomic_write(path) as stream:
        for number, line in enumerate(failure_lines(folder, manifest)):
            try:
                key = key_hash(json.loads(line)["key"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PomscaleError(
                    f"{folder / FAILURES_NAME}: line {number + 1:,} cannot be read: {error}; {REMEDY}"
                ) from error
            if share.chosen(np.array([key], np.uint64))[0]:
                stream.write(line)
                num_failures += 1
    if not num_failures:
        path.unlink()
    return num_failures


# -- one shard, in a process of its own --------------------------------------------------------------------------------


def _write_shard(folder: Path, manifest: Manifest, share: _Share, cut: _Cut) -> _Written:
    index = map_index(folder / INDEX_NAME, manifest.num_samples, index_dtype(manifest.arrays))
    candidates = index[cut.begin : cut.end]
    mine = candidates[share.chosen(candidates["key"])]
    statistics = RunningStatistics()
    rows: list[tuple[int, ...]] = []
    num_incomplete = 0
    members = manifest.array_members
    with atomic_write(share.output / cut.name) as stream:
        for record in read_records(folder, manifest, mine):
            for array in _latents(folder, manifest, cut.group, record):
                statistics.add(array, manifest.latents.stores_moments)
            rows.append(replace(record, offset=stream.tell()).row(0, record.label(), members))
            stream.write(record.blocks)
            num_incomplete += manifest.num_incomplete > 0 and _is_incomplete(record)
        stream.write(tar_end(stream.tell()))
        num_bytes, sha256 = num_bytes_and_sha256(stream)
    info = ShardInfo(name=cut.name, num_samples=len(rows), num_bytes=num_bytes, sha256=sha256, group=cut.group)
    return _Written(info, np.array(rows, index_dtype(manifest.arrays)), statistics.result(), num_incomplete)


def _is_incomplete(record: TarRecord) -> bool:
    """Return whether a clip ends early and was kept."""
    return json.loads(bytes(record.payload(INFO_MEMBER))).get("incomplete") is not None


def _latents(folder: Path, manifest: Manifest, group: int, record: TarRecord) -> Iterator[np.ndarray]:
    """Yield the arrays that the statistics of a dataset cover, in the encoder's order."""
    for name, suffix in manifest.array_members.items():
        if name in ("latent", "flip"):
            try:
                yield stored_array(manifest, group, name, record.payload(suffix))
            except ValueError as error:
                raise PomscaleError(f"{folder}: {record.key}{suffix}: {error}; {REMEDY}") from error
