"""Datasets made of other datasets, by merge and split: what they read, their place on disk, their index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.part_writer import num_bytes_and_sha256
from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.files import atomic_write, make_folder, remove_leftovers, write_text
from pomscale.shards.index import index_dtype, map_index, npy_header
from pomscale.shards.schema import FAILURES_NAME, INDEX_NAME, REMEDY, ArrayName, IndexInfo, Manifest

# What is being made in a folder that has no manifest yet.
_MARKER_NAME = "unfinished.json"


def is_derived(manifest: Manifest) -> bool:
    """Whether the set was made from others, and not by an encode."""
    return manifest.recipe.get("kind") in ("merge", "split")


def origin_of(folder: Path, manifest: Manifest) -> dict[str, str]:
    """How a derived set names one that it was made from."""
    return {"path": str(folder.resolve()), "fingerprint": manifest.fingerprint}


def open_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The index, memory-mapped. PomscaleError if it is not there, or of another size."""
    path = folder / INDEX_NAME
    try:
        return map_index(path, manifest.num_samples, index_dtype(manifest.arrays))
    except (OSError, ValueError) as error:
        raise PomscaleError(f"{path}: cannot be read: {error}; {REMEDY}") from error


def open_checked_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """As open_index, with its checksum: what is made from a damaged index would hide the damage."""
    index = open_index(folder, manifest)
    with (folder / INDEX_NAME).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != manifest.index.sha256:
            raise PomscaleError(f"{folder / INDEX_NAME}: its sha256 differs from the manifest's; {REMEDY}")
    return index


def failure_lines(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    """What the set says of items that could not be encoded. PomscaleError if the list is not there."""
    if not manifest.num_failures:
        return
    try:
        with (folder / FAILURES_NAME).open("rb") as stream:
            yield from stream
    except OSError as error:
        raise PomscaleError(f"{folder / FAILURES_NAME}: {error}; {REMEDY}") from error


@contextmanager
def new_dataset(output: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Makes `output` the folder of a derived set while the block runs, which writes the manifest last.

    A run that was killed may be repeated: it starts over in the same folder. InputError if there is anything else.
    """
    text = json.dumps(recipe, sort_keys=True)
    marker = output / _MARKER_NAME
    make_folder(output)
    if any(output.iterdir()) and not (marker.exists() and marker.read_text(encoding="utf-8") == text):
        raise InputError(f"{output}: is not empty; choose another output, or delete it")
    remove_leftovers(output)
    write_text(marker, text)
    yield
    marker.unlink()


def write_index(
    folder: Path, arrays: tuple[ArrayName, ...], num_rows: int, blocks: Iterable[np.ndarray]
) -> tuple[IndexInfo, str]:
    """Writes blocks of rows, `num_rows` in all, one after the other. Returns also the sha256 of the key column."""
    keys = hashlib.sha256()
    with atomic_write(folder / INDEX_NAME) as stream:
        stream.write(npy_header((num_rows,), index_dtype(arrays)))
        for rows in blocks:
            keys.update(rows["key"].tobytes())
            stream.write(rows.tobytes())
        num_bytes, sha256 = num_bytes_and_sha256(stream)
    return IndexInfo(num_bytes=num_bytes, sha256=sha256), keys.hexdigest()
