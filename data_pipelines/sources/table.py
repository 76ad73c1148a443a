"""Tables whose rows name a file, hold one, or are captions only: Parquet, CSV, JSONL."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

from data_pipelines.sources import fs
from data_pipelines.sources.annotations import ClassIds, checked_caption
from data_pipelines.sources.keys import checked_key, readable
from data_pipelines.sources.rows import Row, read_csv, read_jsonl
from data_pipelines.sources.source import Item
from pomscale.base.errors import InputError
from pomscale.config.encode import TableSourceConfig

_COLUMN = re.compile(r"\{([^{}]+)\}")


class TableSource:
    """The rows of one table, or of several in the order of their paths.

    Rows with their bytes in the table are not shuffled: a row group is read as a whole.
    """

    num_ignored = 0

    def __init__(self, config: TableSourceConfig) -> None:
        self._config = config
        self._files = fs.NamedFiles(config.path, "*.parquet")
        self._classes = ClassIds(config.class_names)
        media = [] if config.media is None else _COLUMN.findall(config.media)
        if config.media is not None and re.search("[{}]", _COLUMN.sub("", config.media)):
            raise InputError(f"source.media: {config.media!r}: a brace has no partner; columns are written {{column}}")
        self._media_columns = media
        named = [*media, *filter(None, (config.key, config.caption, config.label))]
        self._columns = list(dict.fromkeys(named))
        self._bytes = None if config.bytes_column is None else _parquet().BytesReader(config.bytes_column)

    @property
    def shuffled(self) -> bool:
        return self._bytes is None

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._config.label is None else self._classes.names

    def scan(self) -> Iterator[Item]:
        """InputError if a table is missing, of an unknown kind or damaged, or lacks a column."""
        self._classes.begin()
        number = 0
        for path, name in self._files.find():
            for row_number, (place, row) in enumerate(self._rows(path)):
                where = f"{readable(name)} row {row_number}"
                yield self._item(f"{number:012d}", where, None if place is None else [name, *place], row)
                number += 1

    def fingerprint_line(self, item: Item) -> str:
        """Key, path of the file or place in the table, class and caption."""
        place = item.place[1:] if isinstance(item.place, list) else item.place
        return json.dumps([item.key, place, item.label, item.caption])

    def open(self, item: Item) -> BinaryIO:
        if self._bytes is not None:
            name, *place = item.place
            return io.BytesIO(self._bytes.read(self._files.path(name), *place))
        if self._config.media is None:
            raise InputError("source: the table has captions only; name its files with source.media or bytes_column")
        return fs.open_item(fs.join(self._config.root, item.place), None)

    def _rows(self, path: str) -> Iterator[tuple[list[Any] | None, Row]]:
        """Rows with their place in the table, where that is needed."""
        kind = os.path.splitext(path)[1].lower()
        if kind == ".parquet":
            for place, row in _parquet().read_rows(path, self._columns, self._config.bytes_column):
                yield place if self._bytes is not None else None, row
        elif kind not in {".csv", ".jsonl"}:
            raise InputError(f"source.path: {path}: tables are .parquet, .csv or .jsonl")
        elif self._bytes is not None:
            raise InputError(f"source.bytes_column: {path} cannot hold files; only Parquet can")
        else:
            read = read_csv if kind == ".csv" else read_jsonl
            yield from ((None, row) for row in read(path, self._columns))

    def _item(self, number: str, where: str, place: list[Any] | str | None, row: Row) -> Item:
        if isinstance(row, str):
            return Item(number, where, problem=row)
        config = self._config
        label, caption = None, None
        key, problem = (number, None) if config.key is None else _checked_key(row.get(config.key), number)
        needed = [*self._media_columns, *filter(None, [config.bytes_column])]
        missing = [column for column in needed if _is_missing(row.get(column))]
        if missing:
            problem = problem or f"its {', '.join(missing)} is missing"
        elif config.media is not None:
            place = _COLUMN.sub(lambda match: str(row[match[1]]), config.media)
            where = f"{where}: {readable(place)}"
        if config.label is not None:
            label, unusable = self._classes.checked(row.get(config.label))
            problem = problem or unusable
        if config.caption is not None:
            caption, unusable = checked_caption(row.get(config.caption))
            problem = problem or unusable
        return Item(key, where, place, label, caption, problem)


def _checked_key(value: Any, number: str) -> tuple[str, str | None]:
    return (number, "its key is missing") if _is_missing(value) else checked_key(str(value))


def _is_missing(value: Any) -> bool:
    # NaN: tables of numbers have nothing else for it.
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _parquet() -> ModuleType:
    try:
        from data_pipelines.sources import parquet  # noqa: PLC0415  pyarrow is optional
    except ImportError as error:
        raise InputError("source: Parquet tables need pyarrow: pip install -e '.[table]'") from error
    return parquet
