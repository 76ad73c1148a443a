"""Check that every item of a dataset's source is a record, or is listed as failed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipelines.check.shard_check import Problems
from data_pipelines.encode.items import ItemTable
from data_pipelines.shards.equal_keys import sorted_buckets
from data_pipelines.shards.parts import PARTS_FOLDER
from pomscale.base.errors import PomscaleError
from pomscale.shards.index import key_hash
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, Manifest

_MAX_MISSING_NAMED = 20


def check_source(folder: Path, manifest: Manifest, keys: np.ndarray, problems: Problems) -> None:
    """Count the items and, where the encoder's list of items still exists, name those that are missing.

    Args:
        folder: The dataset.
        manifest: Its manifest.
        keys: Hashes of the keys of all records, (n,) uint64.
        problems: Receives the problems.
    """
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
        try:
            table = _item_table(folder, manifest)
        except PomscaleError as error:  # the problems of the shards are to be reported all the same
            problems.add([str(error)])
            return
        if table is None:
            return
        missing = _missing_items(table.key_hashes(), keys, failed)
        named = list(islice(missing, _MAX_MISSING_NAMED))
        problems.add(
            f"{table[item].key}: is neither in a shard nor in {FAILURES_NAME} ({table[item].where})" for item in named
        )
        num_more = sum(1 for _ in missing)
        if num_more:
            problems.add([f"{num_more:,} more items are neither in a shard nor in {FAILURES_NAME}"], num_more)


def _failed_keys(folder: Path, manifest: Manifest, problems: Problems, files: ExitStack) -> np.ndarray:
    """Return the hashes of the keys in failures.jsonl, which must be as many as the manifest says."""
    if not manifest.num_failures:
        return np.empty(0, "<u8")
    file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  closed with the stack
    num_failures = 0
    try:
        with (folder / FAILURES_NAME).open("rb") as stream:
            for line in stream:
                file.write(np.uint64(key_hash(json.loads(line)["key"])).tobytes())
                num_failures += 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.add([f"{FAILURES_NAME}: line {num_failures + 1:,} cannot be read: {error}"])
    if num_failures != manifest.num_failures:
        problems.add([f"{FAILURES_NAME}: lists {num_failures:,} failures, the manifest {manifest.num_failures:,}"])
    file.flush()
    return np.memmap(file, "<u8", "r") if num_failures else np.empty(0, "<u8")


def _item_table(folder: Path, manifest: Manifest) -> ItemTable | None:
    """Return the encoder's list of its source; that of an encode in several sizes lies one folder up."""
    for parent in (folder, folder.parent):
        table = ItemTable.open(parent / PARTS_FOLDER)
        if table is not None and table.fingerprint == manifest.source.fingerprint:
            return table
    return None


def _missing_items(items: np.ndarray, encoded: np.ndarray, failed: np.ndarray) -> Iterator[int]:
    for mine, *present in sorted_buckets([items, encoded, failed]):
        yield from mine["row"][~np.isin(mine["key"], np.concatenate([rows["key"] for rows in present]))].tolist()
