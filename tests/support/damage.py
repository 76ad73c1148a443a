"""Ways in which a shard goes bad on disk."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from pomscale.shards.index import npy_header
from pomscale.shards.schema import INDEX_NAME, ArrayName, read_manifest
from support.synthetic_dataset import replace_index

HEADER_BYTES = len(npy_header((1, 1), "<f2"))


def overwrite(folder: Path, record: int, offset: int, value: bytes, *, array: ArrayName = "latent") -> Path:
    """Put bytes into a record's member, from `offset` on (negative: from its end); the index does not know of it."""
    row = np.load(folder / INDEX_NAME)[record]
    length = int(row[f"{array}_length"])
    start = int(row[f"{array}_offset"]) + (offset if offset >= 0 else length + offset)
    path = folder / read_manifest(folder).shards[row["shard"]].name
    content = bytearray(path.read_bytes())
    content[start : start + len(value)] = value
    path.write_bytes(content)
    return path


def flip_bit(folder: Path, record: int, *, array: ArrayName = "latent") -> None:
    row = np.load(folder / INDEX_NAME)[record]
    path = folder / read_manifest(folder).shards[row["shard"]].name
    place = int(row[f"{array}_offset"]) + int(row[f"{array}_length"]) - 1
    overwrite(folder, record, -1, bytes([path.read_bytes()[place] ^ 1]), array=array)


def change_row(folder: Path, record: int, field: str, value: int) -> None:
    """Change a row of the index and leave the shard as it is."""
    index = np.load(folder / INDEX_NAME)
    index[field][record] = value
    replace_index(folder, index)


def fix_checksum(folder: Path, record: int, *, array: ArrayName = "latent") -> None:
    """Write the checksum of what lies in the shard now, as if it had been encoded so."""
    index = np.load(folder / INDEX_NAME)
    row = index[record]
    content = (folder / read_manifest(folder).shards[row["shard"]].name).read_bytes()
    start = int(row[f"{array}_offset"])
    index[f"{array}_crc32"][record] = zlib.crc32(content[start : start + int(row[f"{array}_length"])])
    replace_index(folder, index)
