"""Writes records into a tar that any WebDataset reader opens, and notes where they went."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pomscale.data.index import NO_LABEL, index_dtype, key_hash, to_npy
from pomscale.data.schema import ARRAY_MEMBERS, CAPTION_MEMBER, CLASS_MEMBER, INFO_MEMBER, ArrayName


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
        self._tar = tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed by finish
        self._arrays: tuple[ArrayName, ...] = ()
        self._rows: list[tuple[int, ...]] = []

    def add(self, record: Record) -> None:
        self._arrays = tuple(record.arrays)
        places: list[int] = []
        for name, array in record.arrays.items():
            places += self._add_member(record.key + ARRAY_MEMBERS[name], to_npy(array))
        if record.label is not None:
            self._add_member(record.key + CLASS_MEMBER, str(record.label).encode())
        if record.caption is not None:
            self._add_member(record.key + CAPTION_MEMBER, record.caption.encode())
        self._add_member(record.key + INFO_MEMBER, json.dumps(record.info, sort_keys=True).encode())
        label = NO_LABEL if record.label is None else record.label
        self._rows.append((key_hash(record.key), 0, label, *places))

    def finish(self) -> np.ndarray:
        """Ends the tar. Returns the index rows; their shard number, 0 here, is set when shards are put together."""
        self._tar.close()
        return np.array(self._rows, index_dtype(self._arrays))

    def _add_member(self, name: str, payload: bytes) -> tuple[int, int, int]:
        """Offset, length and crc32 of the payload."""
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        header.mode = 0o644
        offset = self._stream.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(payload))
        return offset, len(payload), zlib.crc32(payload)
