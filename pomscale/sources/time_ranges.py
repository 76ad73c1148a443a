"""Time ranges of clips in the rows of a table: a start and an end, or lists of them with a caption each."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pomscale.config.encode import TableSourceConfig
from pomscale.config.where import is_missing

_MICROSECONDS = 1_000_000

# 0:00:10.5, 01:02.250, 10.5; minutes and seconds after a colon have two digits at most and are below 60.
_TIME = re.compile(r"\s*(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)\s*")


@dataclass(frozen=True, slots=True)
class RangeRow:
    """One time range of a clip, and the row that describes it."""

    suffix: str
    """What its key has behind that of the row."""
    row: dict[str, Any]
    span: list[int] | None
    """Start and end in microseconds after the first frame; None where there is a problem."""
    problem: str | None = None


class RangeColumns:
    """The columns of a table that hold time ranges of clips."""

    def __init__(self, config: TableSourceConfig, parallel: Sequence[str]) -> None:
        """Take the recipe, and the columns that have a value per range where they are lists."""
        self._ranges, self._start, self._end = config.ranges, config.start, config.end
        self._parallel = parallel

    @property
    def columns(self) -> list[str]:
        return [column for column in (self._ranges, self._start, self._end) if column is not None]

    def rows(self, row: dict[str, Any]) -> list[RangeRow]:
        """Return a row for each range in a row, or one with a problem; the row as it is where its table has none."""
        if not self.columns:
            return [RangeRow("", row, None)]
        pairs = self._pairs(row)
        if isinstance(pairs, str):
            return [self._wrong(row, pairs)]
        if isinstance(pairs, tuple):
            return [_range_row("", row, *pairs)]
        rows = self._values(row, len(pairs))
        if isinstance(rows, str):
            return [self._wrong(row, rows)]
        return [_range_row(f"_{i:05d}", one, *pair) for i, (one, pair) in enumerate(zip(rows, pairs, strict=True))]

    def _wrong(self, row: dict[str, Any], problem: str) -> RangeRow:
        """Return the row with a problem; its lists are lists, which are not compared as texts."""
        found = {column: _as_list(row.get(column)) for column in self._parallel}
        lists = {column: [] if _looks_like_list(value) else value for column, value in found.items()}
        return RangeRow("", row | lists, None, problem)

    def _pairs(self, row: dict[str, Any]) -> tuple[Any, Any] | list[tuple[Any, Any]] | str:
        """Return start and end, or a list of them, or why there are none."""
        if self._ranges is not None:
            return _pairs_of(self._ranges, _as_list(row.get(self._ranges)))
        assert self._start is not None
        assert self._end is not None
        start, end = _as_list(row.get(self._start)), _as_list(row.get(self._end))
        if not isinstance(start, list) and not isinstance(end, list):
            return start, end
        if not isinstance(start, list) or not isinstance(end, list) or len(start) != len(end):
            return f"its {self._start} and {self._end} are not as many"
        return list(zip(start, end, strict=True)) or f"its {self._start} is an empty list"

    def _values(self, row: dict[str, Any], count: int) -> list[dict[str, Any]] | str:
        """Return a row for each of several ranges, or why the values cannot be told apart."""
        lists = {}
        for column in self._parallel:
            value = row.get(column)
            found = _as_list(value)
            if isinstance(found, list):
                if len(found) != count:
                    return f"it has {count} ranges and {len(found)} values of {column}"
                lists[column] = found
            elif _looks_like_list(value):
                return f"its {column} is no list that can be read: {value!r:.40}"
        return [row | {column: values[i] for column, values in lists.items()} for i in range(count)]


def _pairs_of(column: str, value: Any) -> tuple[Any, Any] | list[tuple[Any, Any]] | str:
    """Return the start and end that a value of the column `ranges` holds, or a list of them, or why there are none."""
    if is_missing(value):
        return f"its {column} is missing"
    if not isinstance(value, list):
        return f"its {column} is neither [start, end] nor a list of these but {value!r:.40}"
    if len(value) == 2 and not any(isinstance(each, list | tuple) for each in value):
        return value[0], value[1]
    pairs = []
    for each in value:
        if not isinstance(each, list | tuple) or len(each) != 2:
            return f"its {column} has an element that is not [start, end] but {each!r:.40}"
        pairs.append((each[0], each[1]))
    return pairs or f"its {column} is an empty list"


def _range_row(suffix: str, row: dict[str, Any], start: Any, end: Any) -> RangeRow:
    for name, value in (("start", start), ("end", end)):
        if is_missing(value):
            return RangeRow(suffix, row, None, f"its range has no {name}")
        if parse_time(value) is None:
            return RangeRow(suffix, row, None, f"the {name} of its range is no time but {value!r:.40}")
    first, last = parse_time(start), parse_time(end)
    assert first is not None
    assert last is not None
    if first >= last:
        return RangeRow(suffix, row, None, f"its range is empty: it ends at {end!s:.40} and starts at {start!s:.40}")
    return RangeRow(suffix, row, [first, last])


def parse_time(value: Any) -> int | None:
    """Return the microseconds of a time, which is seconds or a text such as 0:00:10.5; None if it is none."""
    if isinstance(value, str):
        match = _TIME.fullmatch(value)
        if match is None:
            return None
        hours, minutes, seconds = int(match[1] or 0), int(match[2] or 0), float(match[3])
        if (match[2] is not None and seconds >= 60) or (match[1] is not None and minutes >= 60):
            return None
        return (3600 * hours + 60 * minutes) * _MICROSECONDS + round(seconds * _MICROSECONDS)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return round(value * _MICROSECONDS)


def _looks_like_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _as_list(value: Any) -> Any:
    """Return a list that is written as a text, of JSON or of Python; any other value as it is."""
    if not _looks_like_list(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else value
    return value
