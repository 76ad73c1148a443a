"""Writes records into a tar that any WebDataset reader opens, and notes where they went."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pomscale.data.index import INDEX_DTYPE, to_npy
from pomscale.data.schema import CLASS_MEMBER, FLIP_MEMBER, INFO_MEMBER, LATENT_MEMBER


@dataclass(frozen=True, slots=True)
class Record:
    key: str
    latent: np.ndarray  # (c, h, w) or moments (2c, h, w), float16, unscaled
    flip: np.ndarray | None  # the same of the mirrored picture
    label: int
    info: dict[str, Any]  # provenance, stored as JSON


class ShardWriter:
    """One tar, byte for byte a function of the records: plain ustar headers without times or owners."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._tar = tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed by finish
        self._rows: list[tuple[int, ...]] = []

    def add(self, record: Record) -> None:
        latent = self._add_member(record.key + LATENT_MEMBER, to_npy(record.latent))
        flip = (0, 0, 0)
        if record.flip is not None:
            flip = self._add_member(record.key + FLIP_MEMBER, to_npy(record.flip))
        self._add_member(record.key + CLASS_MEMBER, str(record.label).encode())
        self._add_member(record.key + INFO_MEMBER, json.dumps(record.info, sort_keys=True).encode())
        self._rows.append((0, record.label, *latent, *flip))

    def finish(self) -> np.ndarray:
        """Ends the tar. Returns the index rows; their shard number, 0 here, is set when shards are put together."""
        self._tar.close()
        return np.array(self._rows, INDEX_DTYPE)

    def _add_member(self, name: str, payload: bytes) -> tuple[int, int, int]:
        """Offset, length and crc32 of the payload."""
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        header.mode = 0o644
        offset = self._stream.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(payload))
        return offset, len(payload), zlib.crc32(payload)
