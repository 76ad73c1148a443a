"""Merge datasets that were made alike into one, whose shards are links to theirs where the file system has links."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.derive.new_dataset import new_dataset, origin_of
from data_pipelines.shards.equal_keys import sorted_buckets
from data_pipelines.shards.readers import failure_lines, open_checked_index, read_records
from data_pipelines.shards.statistics import ChannelStatistics
from data_pipelines.shards.workers import over_shards
from data_pipelines.shards.writers import write_index
from pomscale import __version__
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, link_or_copy, write_text
from pomscale.config.encode import TransformConfig
from pomscale.shards.class_names import check_same_classes
from pomscale.shards.index import index_dtype
from pomscale.shards.schema import (
    FAILURES_NAME,
    MANIFEST_NAME,
    GroupInfo,
    LatentInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    TextInfo,
    read_manifest,
)


@dataclass(frozen=True)
class MergeReport:
    """Outcome of a merge. Shards that could not be linked were copied."""

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
    """One of the datasets to merge."""

    folder: Path
    manifest: Manifest
    index: np.ndarray

    def first_row(self, shard: int) -> int:
        return self._ends[shard]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(accumulate((shard.num_samples for shard in self.manifest.shards), initial=0))


@dataclass(frozen=True)
class _MergedShard:
    """Shard `number` of a set, and its description in the merged one."""

    of: _Set
    number: int
    info: ShardInfo


def merge(
    folders: Sequence[str | Path], output: str | Path, *, num_workers: int | None = None, progress: bool = True
) -> MergeReport:
    """Write a dataset whose records are those of several others; groups of equal shape become one.

    Shards are hard links, or copies where the file system has no links. Their contents are not read, so only `verify`
    finds damage. A merge that was killed may be repeated.

    Args:
        folders: The datasets, at least two.
        output: Folder of the new dataset.
        num_workers: Number of processes; None for as many as there are cores and the data is worth.
        progress: Show progress on stderr.

    Raises:
        InputError: Two sets, which the message names, were made differently or have a key in common; or `output` holds
            something else.
    """
    sets = [_open(Path(folder)) for folder in folders]
    if len(sets) < 2:
        raise InputError("merge: name at least two datasets")
    for other in sets[1:]:
        _refuse_differences(sets[0], other)
    _refuse_common_keys(sets)
    output = Path(output)
    groups = _unite_groups(sets)
    shards = _merged_shards(sets, groups)
    recipe = {"kind": "merge", "of": [origin_of(one.folder, one.manifest) for one in sets]}
    with new_dataset(output, recipe):
        copied = over_shards(
            _link_or_copy,
            [(one.of.folder / one.of.manifest.shards[one.number].name, output / one.info.name) for one in shards],
            [one.info.num_bytes for one in shards],
            label="merge",
            num_workers=num_workers,
            progress=progress,
        )
        num_copied = sum(copied)
        manifest = _write(output, sets, groups, shards, recipe)
    return MergeReport(output, len(sets), manifest.num_samples, len(shards), num_copied)


def _open(folder: Path) -> _Set:
    manifest = read_manifest(folder)
    return _Set(folder, manifest, open_checked_index(folder, manifest))


def _refuse_differences(one: _Set, other: _Set) -> None:
    check_same_classes(
        f"dataset {other.folder}", other.manifest.class_names, f"dataset {one.folder}", one.manifest.class_names
    )
    others = _common_properties(other.manifest)
    for name, value in _common_properties(one.manifest).items():
        if value != others[name]:
            raise InputError(
                f"merge: {name} of {one.folder} is {value}, but that of {other.folder} is {others[name]}; "
                f"encode one of them again, or train on both as a mixture"
            )


def _common_properties(manifest: Manifest) -> dict[str, Any]:
    """Return the properties that all sets must share.

    Paths of weights, and the sizes that pictures or clips were cut to, may differ; sizes may not for features.
    """
    codec, latent, text, transform = manifest.codec, manifest.latent, manifest.text, manifest.transform
    features = manifest.features
    location = {"path", "subfolder"}
    return {
        "codec": codec and codec.config.model_dump(exclude=location),
        "codec identity": codec and (codec.identity, codec.scaling_factor, codec.shift),
        "latent": latent and latent.model_dump(include={"dtype", "coding", "stores_moments", "has_flip"}),
        "transform": transform and transform.model_dump(exclude=set() if features else {"size", "sizes", "buckets"}),
        "transform_version": manifest.transform_version,
        "text_version": manifest.text_version,
        "text encoder": text and [encoder.config.model_dump(exclude=location) for encoder in text.encoders],
        "text encoder identity": text and [(one.identity, one.dim, one.dtype) for one in text.encoders],
        "features": features and features.model_dump(),
        "has_captions": manifest.has_captions,
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
        for index in (order[same[0]], order[same[0] + 1]):
            number = int(np.searchsorted(begins, index, side="right")) - 1
            one, row = sets[number], columns[number]["row"][index - begins[number]]
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


def _merged_shards(sets: Sequence[_Set], groups: list[GroupInfo]) -> list[_MergedShard]:
    """Return the shards by group, then set, then number."""
    shapes = [group.shape for group in groups]
    shards: list[_MergedShard] = []
    for group, shape in enumerate(shapes):
        for one in sets:
            for number, shard in enumerate(one.manifest.shards):
                if one.manifest.groups[shard.group].shape == shape:
                    name = f"shard-{len(shards):06d}.tar"
                    shards.append(_MergedShard(one, number, shard.model_copy(update={"name": name, "group": group})))
    return shards


def _link_or_copy(task: tuple[Path, Path]) -> bool:
    """Link or copy a shard, replacing the target if it exists. Return whether it was copied."""
    return link_or_copy(*task)


def _write(
    output: Path, sets: Sequence[_Set], groups: list[GroupInfo], shards: list[_MergedShard], recipe: dict[str, Any]
) -> Manifest:
    """Write failures, index, and last the manifest; return the manifest."""
    first = sets[0].manifest
    num_samples = sum(one.manifest.num_samples for one in sets)
    num_failures = sum(one.manifest.num_failures for one in sets)
    if num_failures:
        with atomic_write(output / FAILURES_NAME) as stream:
            for one in sets:
                stream.writelines(failure_lines(one.folder, one.manifest))
    text = _merged_text(sets)
    arrays = first.model_copy(update={"text": text}).arrays
    index, keys_sha256 = write_index(output, arrays, num_samples, _rows(shards, index_dtype(arrays)))
    fingerprints = "".join(f"{one.manifest.source.fingerprint}\n" for one in sets)
    manifest = first.model_copy(
        update={
            "pomscale_version": __version__,
            "latent": _merged_latent(sets),
            "transform": _merged_transform(sets),
            "text": text,
            "num_samples": num_samples,
            "num_failures": num_failures,
            "num_incomplete": sum(one.manifest.num_incomplete for one in sets),
            "source": SourceInfo(
                fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
                num_items=sum(one.manifest.source.num_items for one in sets),
                num_filtered=sum(one.manifest.source.num_filtered for one in sets),
            ),
            "groups": tuple(groups),
            "shards": tuple(one.info for one in shards),
            "keys_sha256": keys_sha256,
            "index": index,
            "recipe": recipe,
        }
    )
    write_text(output / MANIFEST_NAME, manifest.model_dump_json(indent=2))
    return manifest


def _rows(shards: list[_MergedShard], dtype: np.dtype) -> Iterator[np.ndarray]:
    for number, one in enumerate(shards):
        begin = one.of.first_row(one.number)
        of_set = one.of.index[begin : begin + one.info.num_samples]
        rows = np.zeros(len(of_set), dtype)
        for name in of_set.dtype.names or ():  # a set whose records have fewer captions has fewer columns
            rows[name] = of_set[name]
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


def _merged_text(sets: Sequence[_Set]) -> TextInfo | None:
    texts = [one.manifest.text for one in sets if one.manifest.text is not None]
    if not texts:
        return None
    num_captions = {"num_captions": max(text.num_captions for text in texts)}
    return TextInfo.of([encoder.model_copy(update=num_captions) for encoder in texts[0].encoders])


def _merged_transform(sets: Sequence[_Set]) -> TransformConfig | None:
    """Return the transform of the sets, with the buckets of all of them in the order in which they come."""
    transforms = [one.manifest.transform for one in sets if one.manifest.transform is not None]
    if not transforms or all(transform == transforms[0] for transform in transforms):
        return sets[0].manifest.transform
    buckets = list(dict.fromkeys(target for transform in transforms for target in transform.targets))
    values = {**transforms[0].model_dump(exclude={"size", "sizes"}), "buckets": buckets}
    return type(transforms[0]).model_validate(values)
