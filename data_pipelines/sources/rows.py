"""Rows of CSV and JSONL tables, one at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from typing import Any

from data_pipelines.sources import fs
from pomscale.base.errors import InputError

# The columns of a row; or why it has none.
Row = dict[str, Any] | str


def read_csv(path: str, columns: Collection[str]) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; '' where a cell is empty, None where it is not there.

    InputError if a column is missing or a line cannot be split into cells.
    """
    with fs.open_stream(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text)
        try:
            check_columns(path, columns, reader.fieldnames or ())
            yield from reader
        except csv.Error as error:
            where = f"{path} after line {reader.line_num:,}"
            raise InputError(f"source.path: {where}: {error}; is a quote not closed?") from error


def read_jsonl(path: str, columns: Collection[str]) -> Iterator[Row]:
    """One JSON object per line; empty lines are left out. InputError if a column is in no row at all."""
    never_seen, there = set(columns), list[str]()
    with fs.open_stream(path) as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                yield "the line is no JSON"
                continue
            if isinstance(row, dict):
                there = there or list(row)
                never_seen -= row.keys()
                yield row
            else:
                yield "the line is no JSON object"
    check_columns(path, sorted(never_seen), there)


def check_columns(path: str, wanted: Collection[str], there: Collection[str]) -> None:
    """InputError if a column is missing."""
    for column in wanted:
        if column not in there:
            raise InputError(f"source: {path} has no column {column!r}; its columns are {', '.join(there) or 'none'}")
