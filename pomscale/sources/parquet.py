"""Parquet tables: their rows, and the files that rows hold as bytes.

A field of a struct counts as a column of its own, such as image.bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pomscale.base.errors import InputError
from pomscale.sources import storage
from pomscale.sources.item_fields import check_columns, decode_text
from pomscale.sources.protocol import SourceChangedError

_BUFFER_BYTES = 2**20

# Rows in memory at once; fewer where the files in them have to be read as well.
_BATCH_ROWS = 4096
_BATCH_ROWS_WITH_BYTES = 64

# Threads work on neighbouring rows: on one row group, or on two at its end.
_NUM_CACHED_GROUPS = 2


def read_rows(path: str, columns: list[str], bytes_column: str | None) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield location in the table (for `BytesReader`) and columns of every row, in constant memory.

    Texts are texts whether the column's type is string or binary, a view or a dictionary; bytes that are not UTF-8 are
    kept as surrogates. `bytes_column` itself is not read: its value is True where the row has bytes, else None. Raises
    InputError if the file is no whole Parquet file, or a column is missing, named twice or of the wrong type.
    """
    with storage.open_stream(path) as stream, _readable(path):
        num_bytes = storage.size_of(stream)
        with pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            schema = _flat(table.schema_arrow.empty_table()).schema
            check_columns(path, columns if bytes_column is None else [*columns, bytes_column], schema.names)
            if bytes_column is not None and not _is_binary(schema.field(bytes_column).type):
                kind = schema.field(bytes_column).type
                raise InputError(f"source.bytes_column: column {bytes_column!r} of {path} is {kind}, not binary")
            for group in range(table.num_row_groups):
                for row, values in enumerate(_read_group(table, group, columns, bytes_column)):
                    yield [num_bytes, group, row], values


class BytesReader:
    """Reads files out of rows. Row groups in use stay in memory for all threads; one thread loads, the others wait."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._recent: dict[tuple[str, int], Future[pa.ChunkedArray]] = {}

    def read(self, path: str, num_bytes: int, group: int, row: int) -> bytes:
        """Return the file in a row. Raises the errors of `Source.open`."""
        with self._lock:
            found = self._recent.pop((path, group), None)
            values: Future[pa.ChunkedArray] = Future() if found is None else found
            self._recent[path, group] = values  # the latest is last
            if len(self._recent) > _NUM_CACHED_GROUPS:
                del self._recent[next(iter(self._recent))]
        if found is None:
            try:
                values.set_result(self._load(path, num_bytes, group))
            except BaseException as error:
                with self._lock:  # the next to ask tries again
                    if self._recent.get((path, group)) is values:
                        del self._recent[path, group]
                values.set_exception(error)
                raise
        return values.result()[row].as_py()

    def _load(self, path: str, num_bytes: int, group: int) -> pa.ChunkedArray:
        with storage.open_large_item(path, num_bytes) as stream:
            try:
                with pq.ParquetFile(stream, pre_buffer=False) as table:
                    content = table.read_row_group(group, [self._column], use_threads=False)
            except (pa.ArrowException, OSError) as error:  # what storage itself raises is a PomscaleError
                raise SourceChangedError(f"its row group {group} is damaged: {_first_line(error)}") from error
        return _flat(content).column(self._column)


def _read_group(
    table: pq.ParquetFile, group: int, columns: list[str], bytes_column: str | None
) -> Iterator[dict[str, Any]]:
    check_bytes = bytes_column is not None and _may_have_nulls(table, group, bytes_column)
    wanted = [*columns, bytes_column] if check_bytes else columns
    num_rows = _BATCH_ROWS_WITH_BYTES if check_bytes else _BATCH_ROWS
    for batch in table.iter_batches(num_rows, row_groups=[group], columns=wanted, use_threads=False):
        flat = _flat(pa.Table.from_batches([batch]))
        rows: list[dict[str, Any]] = [{} for _ in range(len(flat))]
        for column in columns:
            for row, value in zip(rows, _values(flat.column(column)), strict=True):
                row[column] = value
        if bytes_column is not None:
            present = flat.column(bytes_column).is_valid().to_pylist() if check_bytes else [True] * len(rows)
            for row, has_bytes in zip(rows, present, strict=True):
                row[bytes_column] = has_bytes or None
        yield from rows


def _may_have_nulls(table: pq.ParquetFile, group: int, column: str) -> bool:
    """Return False only where the file's statistics say so.

    Then the column, which is nearly all of the file, need not be read.
    """
    chunks = table.metadata.row_group(group)
    for i in range(chunks.num_columns):
        chunk = chunks.column(i)
        if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
            return chunk.statistics.null_count > 0
    return True


def _is_binary(kind: pa.DataType) -> bool:
    """Return whether values are bytes, in whatever layout."""
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests) or (pa.types.is_dictionary(kind) and _is_binary(kind.value_type))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column, with every text in it as str."""
    plain = _as_bytes(column.type)
    # As bytes first: pyarrow's own conversion ends with an error at the first value that is not UTF-8.
    return column.to_pylist() if plain is None else _decoded(column.cast(plain).to_pylist())


def _as_bytes(kind: pa.DataType) -> pa.DataType | None:
    """Return a type that holds the bytes of a column of texts, or of lists of them; None for any other column."""
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if _is_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_binary()
    lists = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    if any(test(kind) for test in lists):
        inner = _as_bytes(kind.value_type)
        return None if inner is None else pa.large_list(inner)
    return None


def _decoded(values: list[Any]) -> list[Any]:
    return [_decoded(value) if isinstance(value, list) else _text(value) for value in values]


def _text(value: Any) -> Any:
    """Return bytes as the text that they are; those of a fixed size are filled up with zeros."""
    return decode_text(value.rstrip(b"\0")) if isinstance(value, bytes) else value


def _flat(table: pa.Table) -> pa.Table:
    """Return the table with every field of a struct as a column of its own."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"source.path: {path} cannot be read: {_first_line(error)}; mend or remove it") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
