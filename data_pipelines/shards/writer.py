"""Writes records into a tar that any WebDataset reader opens, and notes where they went."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pomscale.shards.index import NO_LABEL, index_dtype, key_hash, to_npy
from pomscale.shards.schema import ARRAY_MEMBERS, CAPTION_MEMBER, CLASS_MEMBER, INFO_MEMBER, ArrayName


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it is stored. All records of a dataset have the same arrays.

    latent, flip: (c, h, w) or (c, f, h, w), moments with 2c, float16, unscaled; text: (tokens, dim) float16.
    """

    key: str
    arrays: Mapping[ArrayName, np.ndarray]  # in the order of Manifest.arrays
    label: int | None
    caption: str | None
    info: dict[str, Any]  # provenance, stored as JSON


class ShardWriter:
    """One tar, byte for byte a function of the records: plain ustar headers without times or owners."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._begin = stream.tell()
        self._arrays: tuple[ArrayName, ...] = ()
        self._rows: list[tuple[int, ...]] = []

    def add(self, record: Record) -> None:
        self._arrays = tuple(record.arrays)
        offset, blocks = self._stream.tell(), bytearray()
        places: list[int] = []
        for name, array in record.arrays.items():
            payload = to_npy(array)
            _append_member(blocks, record.key + ARRAY_MEMBERS[name], payload)
            end = offset + len(blocks) - _padding(len(payload))
            places += (end - len(payload), len(payload), zlib.crc32(payload))
        if record.label is not None:
            _append_member(blocks, record.key + CLASS_MEMBER, str(record.label).encode())
        if record.caption is not None:
            _append_member(blocks, record.key + CAPTION_MEMBER, record.caption.encode())
        _append_member(blocks, record.key + INFO_MEMBER, json.dumps(record.info, sort_keys=True).encode())
        self._stream.write(blocks)
        label = NO_LABEL if record.label is None else record.label
        self._rows.append((key_hash(record.key), 0, label, *places, zlib.crc32(blocks)))

    def finish(self) -> np.ndarray:
        """Ends the tar. Returns the index rows; their shard number, 0 here, is set when shards are put together."""
        self._stream.write(tar_end(self._stream.tell() - self._begin))
        return np.array(self._rows, index_dtype(self._arrays))


def _append_member(blocks: bytearray, name: str, payload: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    header.mode = 0o644
    blocks += header.tobuf(tarfile.USTAR_FORMAT)
    blocks += payload
    blocks += bytes(_padding(len(payload)))


def _padding(num_bytes: int) -> int:
    """Zeros that follow a payload, up to a whole block."""
    return -num_bytes % tarfile.BLOCKSIZE


def tar_end(num_bytes: int) -> bytes:
    """What ends a tar whose members take this many bytes: two empty blocks, and zeros up to a whole tar record."""
    return bytes(2 * tarfile.BLOCKSIZE + -(num_bytes + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
