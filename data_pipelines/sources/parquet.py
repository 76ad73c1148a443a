"""Parquet tables: rows to list, and files that rows hold as bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.common.source import SourceChangedError
from data_pipelines.sources import fs
from pomscale.errors import InputError

# Rows, and for the files in them fewer, that are in memory at once.
_LISTED_ROWS = 4096
_CHECKED_ROWS = 64


def read_rows(path: str, columns: list[str], bytes_column: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Place and columns of every row. In them, `bytes_column` is whether the row has bytes.

    InputError if it is no Parquet file, a column is missing, or `bytes_column` has no bytes.
    """
    with fs.open_stream(path) as stream, _named(path):
        num_bytes = fs.size_of(stream)
        with pq.ParquetFile(stream, pre_buffer=False) as table:
            wanted = [*columns, *([] if bytes_column is None else [bytes_column])]
            check_columns(path, wanted, table.schema_arrow.names)
            if bytes_column is not None:
                kind = table.schema_arrow.field(bytes_column).type
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise InputError(f"source.bytes_column: {path}: column {bytes_column} is {kind}, not binary")
            for group in range(table.num_row_groups):
                for row, values in enumerate(_read_group(table, group, columns, bytes_column)):
                    yield [path, num_bytes, group, row], values


def check_columns(path: str, wanted: list[str], there: list[str]) -> None:
    """InputError if a column is missing."""
    for column in wanted:
        if column not in there:
            raise InputError(f"source: {path} has no column {column!r}; its columns are {', '.join(there)}")
