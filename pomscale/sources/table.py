"""Tables whose rows name a file, hold one, or are captions only: Parquet, CSV, JSONL."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

from pomscale.base.errors import InputError
from pomscale.config.encode import TableSourceConfig
from pomscale.config.where import is_missing
from pomscale.sources import storage
from pomscale.sources.item_fields import ClassIds, checked_caption, checked_key, readable
from pomscale.sources.protocol import Item
from pomscale.sources.row_filter import RowFilter
from pomscale.sources.text_tables import Row, read_csv, read_jsonl
from pomscale.sources.time_ranges import RangeColumns, RangeRow

# Values of a column that are neither a text nor a number: they would become a path or a key that nobody meant.
_SEVERAL = (list, dict)

# A column in `media`: {id}, or {id%_*} for what precedes the last "_" in it.
_COLUMN = re.compile(r"\{([^{}]+?)(?:%([^{}*])\*)?\}")


class TableSource:
    """The rows of one table, or of several in the order of their paths; of a table with time ranges those in them.

    Rows whose files lie in the table are not shuffled, since a row group is read as a whole.
    """

    num_ignored = 0

    def __init__(self, config: TableSourceConfig) -> None:
        self._config = config
        self._files = storage.NamedFiles(config.path, "*.parquet")
        self._classes = ClassIds(config.class_names)
        media = [] if config.media is None else [column for column, _ in _COLUMN.findall(config.media)]
        if config.media is not None and re.search("[{}]", _COLUMN.sub("", config.media)):
            raise InputError(f"source.media: {config.media!r}: a brace has no partner; columns are written {{column}}")
        self._media_columns = media
        self._filter = RowFilter(config.where)
        self._num_filtered = 0
        described = [*filter(None, (config.caption, config.label)), *self._filter.columns]
        self._ranges = RangeColumns(config, described)
        named = [*media, *filter(None, [config.key]), *described, *self._ranges.columns]
        self._columns = list(dict.fromkeys(named))
        self._bytes = None if config.bytes_column is None else _parquet().BytesReader(config.bytes_column)

    @property
    def shuffled(self) -> bool:
        return self._bytes is None

    @property
    def cuts_files(self) -> bool:
        return self._config.has_ranges

    @property
    def num_filtered(self) -> int:
        """Number of rows, or of ranges in them, that `where` left out."""
        return self._num_filtered

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._config.label is None else self._classes.names

    def check_exists(self) -> None:
        self._files.find()

    def scan(self) -> Iterator[Item]:
        """Yield an item per row or time range.

        Raises InputError if a table is missing, unknown or damaged, or lacks a column.
        """
        self._classes.begin()
        self._num_filtered = 0
        number = 0
        for path, name in self._files.find():
            for row_number, (location, row) in enumerate(self._rows(path)):
                where = f"{readable(name)} row {row_number}"
                yield from self._items(f"{number:012d}", where, None if location is None else [name, *location], row)
                number += 1

    def fingerprint_line(self, item: Item) -> str:
        """Return key, path of the file or location in the table, class, caption and time range."""
        location = item.location[1:] if isinstance(item.location, list) else item.location
        span = [] if item.span is None else [item.span]
        return json.dumps([item.key, location, item.label, item.caption, *span])

    def open(self, item: Item) -> BinaryIO:
        if self._bytes is not None:
            name, *location = item.location
            return io.BytesIO(self._bytes.read(self._files.path(name), *location))
        if self._config.media is None:
            raise InputError("source: the table has captions only; name its files with source.media or bytes_column")
        return storage.open_item(storage.join(self._config.root, item.location), None)

    def _rows(self, path: str) -> Iterator[tuple[list[Any] | None, Row]]:
        """Yield rows with their location in the table, None where files are not read from it."""
        kind = os.path.splitext(path)[1].lower()
        if kind == ".parquet":
            for location, row in _parquet().read_rows(path, self._columns, self._config.bytes_column):
                yield location if self._bytes is not None else None, row
        elif kind not in {".csv", ".jsonl"}:
            raise InputError(f"source.path: {path}: tables are .parquet, .csv or .jsonl, not compressed")
        elif self._bytes is not None:
            raise InputError(f"source.bytes_column: {path} cannot hold files; only Parquet can")
        else:
            read = read_csv if kind == ".csv" else read_jsonl
            yield from ((None, row) for row in read(path, self._columns))

    def _items(self, number: str, where: str, location: list[Any] | None, row: Row) -> Iterator[Item]:
        if isinstance(row, str):
            yield Item(number, where, problem=row)
            return
        for one in self._ranges.rows(row):
            is_taken, problem = self._filter.judge(one.row)
            if is_taken:
                yield self._item(number, where, location, one, one.problem or problem)
            else:
                self._num_filtered += 1

    def _item(
        self, number: str, where: str, location: list[Any] | str | None, one: RangeRow, problem: str | None
    ) -> Item:
        config, row = self._config, one.row
        label, caption = None, None
        key, unusable = _checked_key(number if config.key is None else row.get(config.key), one.suffix, number)
        problem = problem or unusable
        needed = [*self._media_columns, *filter(None, [config.bytes_column])]
        missing = [column for column in needed if is_missing(row.get(column))]
        several = [column for column in self._media_columns if isinstance(row.get(column), _SEVERAL)]
        if missing:
            problem = problem or f"its {', '.join(missing)} is missing"
        elif several:
            problem = problem or f"its {', '.join(several)} is not one value but {row[several[0]]!r:.40}"
        elif config.media is not None:
            location = _COLUMN.sub(lambda match: _cut_behind(str(row[match[1]]), match[2]), config.media)
            where = f"{where}: {readable(location)}"
        if one.span is not None:
            where = f"{where} {one.span[0] / 1e6:.3f}-{one.span[1] / 1e6:.3f} s"
        if config.label is not None:
            label, unusable = self._classes.checked(row.get(config.label))
            problem = problem or unusable
        if config.caption is not None:
            caption, unusable = checked_caption(row.get(config.caption), config.caption_lines)
            problem = problem or unusable
        return Item(key, where, location, label, caption, problem, one.span)


def _cut_behind(value: str, mark: str | None) -> str:
    """Return a value without its last `mark` and what follows it; all of it where there is no such mark."""
    return value.rpartition(mark)[0] if mark is not None and mark in value else value


def _checked_key(value: Any, suffix: str, number: str) -> tuple[str, str | None]:
    if is_missing(value):
        return number + suffix, "its key is missing"
    if isinstance(value, _SEVERAL):
        return number + suffix, f"its key is not one value but {value!r:.40}"
    return checked_key(f"{value}{suffix}")


def _parquet() -> ModuleType:
    try:
        from pomscale.sources import parquet  # noqa: PLC0415  pyarrow is optional
    except ImportError as error:
        raise InputError("source: Parquet tables need pyarrow: pip install -e '.[table]'") from error
    return parquet
