"""Times and ranges as tables write them."""

from __future__ import annotations

from typing import Any

import pytest

from pomscale.config.encode import TableSourceConfig
from pomscale.sources.time_ranges import RangeColumns, parse_time


@pytest.mark.parametrize(
    ("value", "microseconds"),
    [
        (0, 0), (10.5, 10_500_000), (0.1, 100_000), ("10.5", 10_500_000), ("0:00:10.5", 10_500_000),
        ("00:00:10.500", 10_500_000), ("1:02.25", 62_250_000), ("01:00:00", 3_600_000_000), (".5", 500_000),
        ("100:00:00.000001", 360_000_000_001), ("75", 75_000_000), (" 0:00:01 ", 1_000_000),
        ("0:60", None), ("0:61:00", None), ("-1", None), (-1, None), (float("inf"), None), (float("nan"), None),
        ("1:2:3:4", None), ("00:00:10,5", None), ("soon", None), ("", None), (True, None), ([1], None),
        ("0:00:010:00:02", None), ("1e3", None),
    ],
)  # fmt: skip
def test_times(value: Any, microseconds: int | None) -> None:
    assert parse_time(value) == microseconds


def rows(row: dict[str, Any], **fields: Any) -> list[tuple[str, Any, list[int] | None, str | None]]:
    config = TableSourceConfig.model_validate({"kind": "table", "path": "t.csv", **fields})
    found = RangeColumns(config, ["text", "score"]).rows(row)
    return [(one.suffix, one.row.get("text"), one.span, one.problem) for one in found]


S = 1_000_000


@pytest.mark.parametrize(
    ("ranges", "text", "expected"),
    [
        ([0, 1], "a", [("", "a", [0, S], None)]),
        ("[0, 1.5]", "[a]", [("", "[a]", [0, S * 3 // 2], None)]),
        ("('0', '1')", "a", [("", "a", None, "its r is neither [start, end] nor a list of these but \"('0', '1')\"")]),
        ([["0:01", "0:02"]], ["a"], [("_00000", "a", [S, 2 * S], None)]),
        ('[["0", "1"], ["2", "3"]]', "one", [("_00000", "one", [0, S], None), ("_00001", "one", [2 * S, 3 * S], None)]),
        ("[['0', '1'], ['3', '3']]", "['a', 'b']", [
            ("_00000", "a", [0, S], None), ("_00001", "b", None, "its range is empty: it ends at 3 and starts at 3"),
        ]),
        ([[0, 1], [None, 2]], [["a", "b"], "c"], [
            ("_00000", ["a", "b"], [0, S], None), ("_00001", "c", None, "its range has no start"),
        ]),
        ([[5, 1]], "a", [("_00000", "a", None, "its range is empty: it ends at 1 and starts at 5")]),
        ([[0, 1], [1, 2]], ["a"], [("", ["a"], None, "it has 2 ranges and 1 values of text")]),
        ([[0, 1, 2]], "a", [("", "a", None, "its r has an element that is not [start, end] but [0, 1, 2]")]),
        (None, "a", [("", "a", None, "its r is missing")]),
        ("0-1", "a", [("", "a", None, "its r is neither [start, end] nor a list of these but '0-1'")]),
    ],
)  # fmt: skip
def test_ranges(ranges: Any, text: Any, expected: list[Any]) -> None:
    assert rows({"r": ranges, "text": text}, ranges="r") == expected


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("0", "1", [("", "a", [0, S], None)]),
        ([0, 2], [1, 3], [("_00000", "a", [0, S], None), ("_00001", "a", [2 * S, 3 * S], None)]),
        ("[0, 2]", "[1, 3]", [("_00000", "a", [0, S], None), ("_00001", "a", [2 * S, 3 * S], None)]),
        ([0, 2], [1], [("", "a", None, "its s and e are not as many")]),
        ([0], 1, [("", "a", None, "its s and e are not as many")]),
        ([], [], [("", "a", None, "its s is an empty list")]),
        (None, 1, [("", "a", None, "its range has no start")]),
        (1, "", [("", "a", None, "its range has no end")]),
    ],
)
def test_starts_and_ends(start: Any, end: Any, expected: list[Any]) -> None:
    assert rows({"s": start, "e": end, "text": "a"}, start="s", end="e") == expected


def test_a_table_without_ranges_has_its_rows() -> None:
    assert rows({"text": "a"}) == [("", "a", None, None)]
