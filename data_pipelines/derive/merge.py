"""Several datasets that were made alike become one, without copying their shards where that can be helped."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.derive.derived import failure_lines, new_dataset, open_checked_index, origin_of, write_index
from data_pipelines.shards.keys import sorted_buckets
from data_pipelines.shards.records import read_records
from data_pipelines.shards.statistics import ChannelStatistics
from data_pipelines.shards.workers import over_shards
from pomscale import __version__
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, link_or_copy, write_text
from pomscale.config.encode import TransformConfig
from pomscale.shards.schema import (
    FAILURES_NAME,
    MANIFEST_NAME,
    GroupInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    read_manifest,
)


@dataclass(frozen=True)
class MergeReport:
    """What was made, and how: shards that could not be linked were copied."""

    output: Path
    num_sets: int
    num_samples: int
    num_shards: int
    num_copied: int

    def __str__(self) -> str:
        how = f"{self.num_shards - self.num_copied:,} linked, {self.num_copied:,} copied"
        return (
            f"{self.output}: {self.num_samples:,} samples of {self.num_sets} sets in {self.num_shards:,} shards: {how}"
        )


@dataclass(frozen=True)
class _Set:
    folder: Path
    manifest: Manifest
    index: np.ndarray

    def first_row(self, shard: int) -> int:
        return self._ends[shard]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(accumulate((shard.num_samples for shard in self.manifest.shards), initial=0))


@dataclass(frozen=True)
class _Placed:
    """A shard of a set, and what it is in the merged one."""

    of: _Set
    number: int
    info: ShardInfo


def merge(
    folders: Sequence[str | Path], output: str | Path, *, num_workers: int | None = None, progress: bool = True
) -> MergeReport:
    """Writes the dataset `output`, whose records are those of `folders`; groups of equal shape become one.

    Shards are hard links, or copies where the file system has no links; their contents are not read, so damage stays
    for verify to find. Killed, it may be run again. InputError, naming both sets, if they were made differently or
    have a key in common, and if there is something else in `output`.
    """
    sets = [_open(Path(folder)) for folder in folders]
    if len(sets) < 2:
        raise InputError("merge: name at least two datasets")
    for other in sets[1:]:
        _refuse_differences(sets[0], other)
    _refuse_common_keys(sets)
    output = Path(output)
    groups = _unite_groups(sets)
    placed = _place(sets, groups)
    recipe = {"kind": "merge", "of": [origin_of(one.folder, one.manifest) for one in sets]}
    with new_dataset(output, recipe):
        copied = over_shards(
            _link_or_copy,
            [(one.of.folder / one.of.manifest.shards[one.number].name, output / one.info.name) for one in placed],
            [one.info.num_bytes for one in placed],
            label="merge",
            num_workers=num_workers,
            progress=progress,
        )
        num_copied = sum(copied)
        manifest = _write(output, sets, groups, placed, recipe)
    return MergeReport(output, len(sets), manifest.num_samples, len(placed), num_copied)


def _open(folder: Path) -> _Set:
    manifest = read_manifest(folder)
    return _Set(folder, manifest, open_checked_index(folder, manifest))


def _refuse_differences(one: _Set, other: _Set) -> None:
    for (what, mine), theirs in zip(_make(one.manifest).items(), _make(other.manifest).values(), strict=True):
        if mine != theirs:
            raise InputError(
                f"merge: {what} of {one.folder} is {mine}, but that of {other.folder} is {theirs}; "
                f"encode one of them again, or train on both as a mixture"
            )


def _make(manifest: Manifest) -> dict[str, Any]:
    """What sets must have in common. Not where weights lay, and not which sizes pictures or clips were cut to."""
    codec, latent, text, transform = manifest.codec, manifest.latent, manifest.text, manifest.transform
    elsewhere = {"path", "subfolder"}
    return {
        "codec": codec and codec.config.model_dump(exclude=elsewhere),
        "codec identity": codec and (codec.identity, codec.scaling_factor, codec.shift),
        "latent": latent and latent.model_dump(include={"dtype", "stores_moments", "has_flip"}),
        "transform": transform and transform.model_dump(exclude={"size", "sizes", "buckets"}),
        "text encoder": text and text.config.model_dump(exclude=elsewhere),
        "text encoder identity": text and (text.identity, text.dim, text.dtype),
        "has_captions": manifest.has_captions,
        "class_names": manifest.class_names,
    }


def _refuse_common_keys(sets: Sequence[_Set]) -> None:
    for columns in sorted_buckets([one.index["key"] for one in sets]):
        keys = np.concatenate([column["key"] for column in columns])
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if not len(same):
            continue
        begins = np.cumsum([0, *(len(column) for column in columns)])
        found = []
        for place in (order[same[0]], order[same[0] + 1]):
            number = int(np.searchsorted(begins, place, side="right")) - 1
            one, row = sets[number], columns[number]["row"][place - begins[number]]
            (record,) = read_records(one.folder, one.manifest, one.index[[row]])
            found.append((record.key, one.folder))
        (key, folder), (other_key, other_folder) = found
        and_key = f"and {other_key} (of equal hash) of" if key != other_key else "and of"
        raise InputError(f"merge: {key} is a key of {folder} {and_key} {other_folder}; keys must be unique")


def _unite_groups(sets: Sequence[_Set]) -> list[GroupInfo]:
    groups: dict[tuple[int, ...], GroupInfo] = {}
    for one in sets:
        for group in one.manifest.groups:
            groups.setdefault(group.shape, group)
    return list(groups.values())


def _place(sets: Sequence[_Set], groups: list[GroupInfo]) -> list[_Placed]:
    """The shards by group, then set, then number."""
    shapes = [group.shape for group in groups]
    placed: list[_Placed] = []
    for group, shape in enumerate(shapes):
        for one in sets:
            for number, shard in enumerate(one.manifest.shards):
                if one.manifest.groups[shard.group].shape == shape:
                    name = f"shard-{len(placed):06d}.tar"
                    placed.append(_Placed(one, number, shard.model_copy(update={"name": name, "group": group})))
    return placed


def _link_or_copy(task: tuple[Path, Path]) -> bool:
    """Whether a shard had to be copied. What an earlier run left at its place is replaced."""
    return link_or_copy(*task)


def _write(
    output: Path, sets: Sequence[_Set], groups: list[GroupInfo], placed: list[_Placed], recipe: dict[str, Any]
) -> Manifest:
    """Failures, index, and last the manifest."""
    first = sets[0].manifest
    num_samples = sum(one.manifest.num_samples for one in sets)
    num_failures = sum(one.manifest.num_failures for one in sets)
    if num_failures:
        with atomic_write(output / FAILURES_NAME) as stream:
            for one in sets:
                stream.writelines(failure_lines(one.folder, one.manifest))
    index, keys_sha256 = write_index(output, first.arrays, num_samples, _rows(placed))
    fingerprints = "".join(f"{one.manifest.source.fingerprint}\n" for one in sets)
    manifest = first.model_copy(
        update={
            "pomscale_version": __version__,
            "latent": _merged_latent(sets),
            "transform": _merged_transform(sets),
            "num_samples": num_samples,
            "num_failures": num_failures,
            "source": SourceInfo(
                fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
                num_items=sum(one.manifest.source.num_items for one in sets),
            ),
            "groups": tuple(groups),
            "shards": tuple(one.info for one in placed),
            "keys_sha256": keys_sha256,
            "index": index,
            "recipe": recipe,
        }
    )
    write_text(output / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def _rows(placed: list[_Placed]) -> Iterator[np.ndarray]:
    for number, one in enumerate(placed):
        begin = one.of.first_row(one.number)
        rows = one.of.index[begin : begin + one.info.num_samples].copy()
        rows["shard"] = number
        yield rows


def _merged_latent(sets: Sequence[_Set]) -> LatentInfo | None:
    latents = [one.manifest.latent for one in sets if one.manifest.latent is not None]
    if not latents:
        return None
    statistics = functools.reduce(
        ChannelStatistics.merge,
        (
            ChannelStatistics(
                count=latent.num_values,
                mean=latent.mean,
                squares=tuple(std**2 * latent.num_values for std in latent.std),
            )
            for latent in latents
        ),
    )
    return latents[0].model_copy(
        update={"num_values": statistics.count, "mean": statistics.mean, "std": statistics.std}
    )


def _merged_transform(sets: Sequence[_Set]) -> TransformConfig | None:
    """With the buckets of all sets, in the order in which they come."""
    transforms = [one.manifest.transform for one in sets if one.manifest.transform is not None]
    if not transforms or all(transform == transforms[0] for transform in transforms):
        return sets[0].manifest.transform
    buckets = list(dict.fromkeys(target for transform in transforms for target in transform.targets))
    values = {**transforms[0].model_dump(exclude={"size", "sizes"}), "buckets": buckets}
    return type(transforms[0]).model_validate(values)
