"""Reads the rows of an offline wandb run back: wandb ships no reader of its own files any more.

A .wandb file is a LevelDB log: a 7-byte header, then blocks of 32 KiB that hold chunks (crc32, length, type, data)
of protobuf records.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def read_records(path: Path) -> list[Record]:
    data, position, parts, records = path.read_bytes(), _FILE_HEADER, b"", []
    while position + _CHUNK_HEADER <= len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK_HEADER:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        position += _CHUNK_HEADER + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            records.append(Record.FromString(parts))
    return records


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The history rows of a run, as `wandb.log` was given them."""
    histories = [record.history for record in read_records(path) if record.HasField("history")]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for history in histories
    ]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run, as it was updated last."""
    found: dict[str, Any] = {}
    for record in read_records(path):
        for update in (record.run.config.update, record.config.update):
            found |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
    return found
