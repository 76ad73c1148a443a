"""Proof that a dataset is whole: every shard and every record against manifest and index."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pomscale.data.index import INDEX_DTYPE, map_index, npy_header, scan_shard
from pomscale.data.schema import (
    CLASS_MEMBER,
    FLIP_MEMBER,
    INDEX_NAME,
    INFO_MEMBER,
    LATENT_MEMBER,
    REMEDY,
    IndexInfo,
    Manifest,
    ShardInfo,
    read_manifest,
)

_ARRAYS = {LATENT_MEMBER: "latent", FLIP_MEMBER: "flip"}


@dataclass(frozen=True)
class VerifyReport:
    """`problems`: one line each, naming shard and key. Empty = the dataset is whole."""

    folder: Path
    num_samples: int
    num_shards: int
    problems: list[str]

    @property
    def exit_code(self) -> int:
        return 1 if self.problems else 0

    def __str__(self) -> str:
        checked = f"{self.folder}: {self.num_samples:,} samples in {self.num_shards:,} shards"
        if not self.problems:
            return f"{checked}: whole"
        return "\n".join([*self.problems, f"{checked}: {len(self.problems):,} problems; {REMEDY}"])


def verify(folder: str | Path) -> VerifyReport:
    """Reads the whole dataset once. InputError if there is no manifest to hold it against."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = list(_verify_index(folder, manifest))
    # A damaged index is made anew by the next encode; it says nothing about the shards.
    index = None if problems else map_index(folder / INDEX_NAME, manifest.num_samples)
    problems += _verify_listing(folder, manifest)
    keys: dict[str, str] = {}
    first = 0
    for number, shard in enumerate(manifest.shards):
        rows = None if index is None else index[first : first + shard.num_samples]
        problems += _verify_shard(folder, manifest, number, rows, keys)
        first += shard.num_samples
    return VerifyReport(folder, manifest.num_samples, len(manifest.shards), problems)


def _verify_index(folder: Path, manifest: Manifest) -> Iterator[str]:
    path = folder / INDEX_NAME
    try:
        problem = _verify_bytes(path, manifest.index)
        if problem:
            yield f"{INDEX_NAME}: {problem}"
        else:
            map_index(path, manifest.num_samples)
    except (OSError, ValueError) as error:
        yield f"{INDEX_NAME}: cannot be read: {error}"


def _verify_bytes(path: Path, expected: ShardInfo | IndexInfo) -> str | None:
    num_bytes = path.stat().st_size
    if num_bytes != expected.num_bytes:
        return f"has {num_bytes:,} bytes instead of {expected.num_bytes:,}: cut off or overwritten"
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected.sha256:
            return "its sha256 differs from the manifest's"
    return None


def _verify_listing(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path.name}: is not in the manifest"


def _verify_shard(
    folder: Path, manifest: Manifest, number: int, rows: np.ndarray | None, keys: dict[str, str]
) -> Iterator[str]:
    shard = manifest.shards[number]
    path = folder / shard.name
    try:
        problem = _verify_bytes(path, shard)
        if problem:
            yield f"{shard.name}: {problem}"
        suffixes, found = scan_shard(path, number)
        found_keys = list(suffixes)
        if len(found_keys) != shard.num_samples:
            count, last = len(found_keys), found_keys[-1] if found_keys else "none"
            yield f"{shard.name}: {count:,} readable records instead of {shard.num_samples:,}, last key {last}"
        for key in found_keys:
            other = keys.setdefault(key, shard.name)
            if other != shard.name:
                yield f"{shard.name}: {key}: is also a key of {other}"
        yield from _verify_records(path, manifest, shard, suffixes, found)
        if rows is not None:
            yield from _compare_with_index(shard, found_keys, found, rows)
    except FileNotFoundError:
        yield f"{shard.name}: is missing"
    except (tarfile.ReadError, OSError, ValueError, OverflowError) as error:
        yield f"{shard.name}: cannot be read: {error}"


def _verify_records(
    path: Path, manifest: Manifest, shard: ShardInfo, suffixes: dict[str, set[str]], rows: np.ndarray
) -> Iterator[str]:
    shape = manifest.latent.stored_shape
    header = npy_header(shape, "<f2")
    expected_length = len(header) + 2 * int(np.prod(shape))
    required = [LATENT_MEMBER, *([FLIP_MEMBER] if manifest.has_flip else []), CLASS_MEMBER, INFO_MEMBER]
    with path.open("rb") as stream:
        for (key, present), row in zip(suffixes.items(), rows, strict=True):
            for suffix in required:
                if suffix not in present:
                    yield f"{shard.name}: {key}{suffix}: is missing"
            if not 0 <= row["label"] < manifest.num_classes:
                yield f"{shard.name}: {key}: class {row['label']} is not among the {manifest.num_classes} classes"
            for suffix, prefix in _ARRAYS.items():
                if suffix not in present:
                    continue
                length = int(row[f"{prefix}_length"])
                stream.seek(int(row[f"{prefix}_offset"]))
                payload = stream.read(length)
                if length != expected_length or not payload.startswith(header):
                    yield f"{shard.name}: {key}{suffix}: is not a float16 array of shape {shape}"
                elif not np.isfinite(np.frombuffer(payload, "<f2", offset=len(header))).all():
                    yield f"{shard.name}: {key}{suffix}: holds a value that is not finite"


def _compare_with_index(shard: ShardInfo, keys: list[str], found: np.ndarray, rows: np.ndarray) -> Iterator[str]:
    count = min(len(found), len(rows))
    for i in np.flatnonzero(found[:count] != rows[:count]):
        fields = [name for name in INDEX_DTYPE.names or () if found[i][name] != rows[i][name]]
        yield f"{shard.name}: {keys[i]}: {', '.join(fields)} differ from {INDEX_NAME}"
