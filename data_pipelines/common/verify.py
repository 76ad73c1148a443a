"""Proof that a dataset is whole: every shard and every record against manifest and index."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pomscale.data.index import INDEX_DTYPE, npy_header, scan_shard
from pomscale.data.schema import FLIP_MEMBER, INDEX_NAME, LATENT_MEMBER, Manifest, ShardInfo, read_manifest

_MEMBERS = {"latent": LATENT_MEMBER, "flip": FLIP_MEMBER}


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
        return "\n".join([*self.problems, f"{checked}: {len(self.problems):,} problems"])


def verify(folder: str | Path) -> VerifyReport:
    """Reads the whole dataset once. InputError if there is no manifest to hold it against."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = list(_verify_index(folder, manifest))
    index = None if problems else np.load(folder / INDEX_NAME, mmap_mode="r")
    problems += _verify_listing(folder, manifest)
    keys: dict[str, str] = {}
    first = 0
    for number, shard in enumerate(manifest.shards):
        rows = None if index is None else index[first : first + shard.num_samples]
        problems += _verify_shard(folder, manifest, number, rows, keys)
        first += shard.num_samples
    return VerifyReport(folder, manifest.num_samples, len(manifest.shards), problems)


def _verify_index(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        index = np.load(folder / INDEX_NAME, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        yield f"{INDEX_NAME}: cannot be read: {error}"
        return
    if index.dtype != INDEX_DTYPE:
        yield f"{INDEX_NAME}: has other columns than this version of pomscale"
    elif len(index) != manifest.num_samples:
        yield f"{INDEX_NAME}: has {len(index):,} records, the manifest {manifest.num_samples:,}"


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
    if not path.is_file():
        yield f"{shard.name}: is missing"
        return
    if path.stat().st_size != shard.num_bytes:
        yield f"{shard.name}: has {path.stat().st_size:,} bytes instead of {shard.num_bytes:,}: cut off or overwritten"
    else:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                yield f"{shard.name}: its sha256 differs from the manifest's"
    try:
        found_keys, found = scan_shard(path, number)
    except (tarfile.ReadError, OSError, ValueError) as error:
        yield f"{shard.name}: is no readable tar: {error}"
        return
    if len(found_keys) != shard.num_samples:
        last = found_keys[-1] if found_keys else "none"
        yield f"{shard.name}: {len(found_keys):,} readable records instead of {shard.num_samples:,}, last key {last}"
    for key in found_keys:
        other = keys.setdefault(key, shard.name)
        if other != shard.name:
            yield f"{shard.name}: {key}: is also a key of {other}"
    yield from _verify_records(path, manifest, shard, found_keys, found)
    if rows is not None:
        yield from _compare_with_index(shard, found_keys, found, rows)


def _verify_records(
    path: Path, manifest: Manifest, shard: ShardInfo, keys: list[str], rows: np.ndarray
) -> Iterator[str]:
    shape = manifest.latent.stored_shape
    header = npy_header(shape, "<f2")
    expected_length = len(header) + 2 * int(np.prod(shape))
    with path.open("rb") as stream:
        for key, row in zip(keys, rows, strict=True):
            if not 0 <= row["label"] < manifest.num_classes:
                yield f"{shard.name}: {key}: class {row['label']} is not among the {manifest.num_classes} classes"
            for prefix, suffix in _MEMBERS.items():
                length = int(row[f"{prefix}_length"])
                if prefix == "flip" and not manifest.has_flip and length == 0:
                    continue
                if length == 0:
                    yield f"{shard.name}: {key}{suffix}: is missing"
                    continue
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
