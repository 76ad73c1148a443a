"""Rows of tables that are text: CSV and JSONL.

A row that cannot be read with certainty is a problem of its own. Where a fault may have taken in rows that cannot be
told apart, the file is refused, since nobody would miss them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pomscale.base.errors import InputError
from pomscale.sources import storage
from pomscale.sources.item_fields import check_columns, parse_object

# Columns of a row by name; or, as a text, the reason why the row cannot be read.
Row = dict[str, Any] | str

# Characters of a cell. No caption is as long; it bounds the memory that a quote which is never closed takes.
_MAX_CELL = 2**24

# First bytes of texts that Windows writes as "Unicode".
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_csv(path: str, columns: Collection[str]) -> Iterator[Row]:
    """Yield the wanted columns of each row of a table whose first line names the columns.

    Raises InputError if a column is missing or named twice, or if a quote is open over several lines and then not
    closed as it should be: rows lie within it, and it cannot be known which.
    """
    with _opened(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(_MAX_CELL)
        reader = csv.reader(text, strict=True)
        header = _next_cells(path, reader) or []
        if isinstance(header, str):
            raise InputError(f"source.path: {path}: its first line names the columns, but {header}")
        check_columns(path, columns, header)
        places = [(column, header.index(column)) for column in columns]
        while (cells := _next_cells(path, reader)) is not None:
            if isinstance(cells, str):
                yield cells
            elif len(cells) == len(header):
                yield {column: cells[place] for column, place in places}
            elif cells:  # an empty line is no row
                yield _wrong_length(len(cells), len(header))


def _next_cells(path: str, reader: Any) -> list[str] | str | None:
    """Return the cells of the next row, or why they cannot be told; None at the end of the table."""
    begin = reader.line_num
    try:
        return next(reader, None)
    except csv.Error as error:
        # Python's own words for it: "',' expected after '"'", "unexpected end of data", "field larger than ...".
        if reader.line_num > begin + 1:
            raise InputError(
                f"source.path: {path} lines {begin + 1:,} to {reader.line_num:,}: a quote is not closed, or a quote "
                f"inside is not doubled, so that all of these lines are one row ({error}); mend line {begin + 1:,}"
            ) from error
        return f"its quotes are wrong ({error}): a quote inside a quoted cell is written twice"


def _wrong_length(num_cells: int, num_columns: int) -> str:
    if num_cells > num_columns:
        return f"it has {num_cells} cells in {num_columns} columns: a cell with commas must be quoted"
    return (
        f"it has {num_cells} of {num_columns} cells: if a line break in the row before is not quoted, that one is cut "
        f"off, too"
    )


def read_jsonl(path: str, columns: Collection[str]) -> Iterator[Row]:
    """Yield the JSON object of each line that is not empty.

    Raises InputError if a column is in no row at all, or if the file is one JSON array.
    """
    never_seen, present, is_first = set(columns), list[str](), True
    with _opened(path) as stream:
        for line in stream:
            if not line.strip():
                continue
            if is_first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise InputError(
                    f"source.path: {path}: is one JSON array; write one object per line: jq -c '.[]' OLD > NEW.jsonl"
                )
            is_first = False
            row = parse_object(line)
            if isinstance(row, str):
                yield f"the line {row}"
                continue
            present = present or list(row)
            never_seen -= row.keys()
            yield row
    check_columns(path, sorted(never_seen), present)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a table. Raises InputError if it is compressed or UTF-16: its lines would be rows that cannot be read."""
    with storage.open_stream(path) as stream:
        begin = stream.read(storage.MAGIC_BYTES)
        if (name := storage.compression(begin)) is not None:
            raise InputError(f"source.path: {path}: is compressed ({name}); decompress it first")
        if begin.startswith(_UTF16_MARKS):
            raise InputError(f"source.path: {path}: is UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW")
        stream.seek(0)
        yield stream
