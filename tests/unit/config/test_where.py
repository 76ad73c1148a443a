"""Rules of source.where: what each takes, what it cannot compare, and what is no rule."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pomscale.config.encode import TableSourceConfig
from pomscale.config.where import UnusableValueError, parse_rule

RULES: list[tuple[Any, list[Any], list[Any]]] = [
    (">= 5.0", [5, 5.0, "5", " 5.5 ", 1e9, "1e3"], [4.99, "4.99", -5, "-5"]),
    ("> 5", [5.01], [5, "5.0"]),
    ("<=-0.5", ["-0.5", -1], [0]),
    ("< .5", [0, "4e-1"], [0.5]),
    ("0.5..10", [0.5, "10", 3], [0.49, "10.01"]),
    ("-2..-1", [-1.5], [0]),
    (3, [3, "3.0"], [4]),
    (2.5, ["2.5"], [2]),
    ("en", ["en", " en "], ["EN", "english"]),
    ("pan left", ["pan left"], ["pan"]),
    ("!= static", ["pan_left"], ["static"]),
    (["en", "de", 5], ["en", "de", "5"], ["fr"]),
    (True, [True, "true", "True"], [False, "false"]),
    (False, [False, "FALSE"], [True]),
]


@pytest.mark.parametrize(("rule", "taken", "left_out"), RULES, ids=str)
def test_rules_take_and_leave_out(rule: Any, taken: list[Any], left_out: list[Any]) -> None:
    if isinstance(rule, list):
        taken, left_out = ["en", "de"], ["fr"]
        rule = rule[:2]
    condition = parse_rule(rule)
    assert [value for value in taken if not condition(value)] == []
    assert [value for value in left_out if condition(value)] == []


@pytest.mark.parametrize(
    ("rule", "value", "reason"),
    [
        (">= 5", None, "is missing"), ("en", "", "is missing"), (3, float("nan"), "is missing"),
        (">= 5", "n/a", "'n/a' is no number"), ("0..1", "nan", "'nan' is no number"), (3, True, "True is no number"),
        (3, [3], r"\[3\] is no number"), (3, "1_0", "'1_0' is no number"), ("en", ["en"], r"\['en'\] is no text"),
        (True, "no", "'no' is neither true nor false"), ("!= a", None, "is missing"), ([1, 2], "x", "'x' is no number"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_compared_are_told(rule: Any, value: Any, reason: str) -> None:
    with pytest.raises(UnusableValueError, match=reason):
        parse_rule(rule)(value)


@pytest.mark.parametrize("rule", [">= high", "== 5", "=5", "5..", "..3", "10..1", "", "<>3", "!5", [], [">= 5"], "!="])
def test_what_is_no_rule_is_refused_with_its_column(rule: Any) -> None:
    with pytest.raises(ValidationError, match="aesthetic score: "):
        TableSourceConfig(kind="table", path="t.csv", where={"aesthetic score": rule})


def test_a_section_without_the_new_fields_is_what_it_was() -> None:
    old = {"kind": "table", "path": "t.csv", "media": "{a}", "key": None}
    assert not {"where", "ranges", "start", "end"} & TableSourceConfig.model_validate(old).model_dump().keys()


@pytest.mark.parametrize("fields", [{"start": "a"}, {"end": "b"}, {"start": "a", "end": "b", "ranges": "c"}])
def test_ranges_come_in_one_way(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="give `ranges`, or `start` and `end`, or none of them"):
        TableSourceConfig.model_validate({"kind": "table", "path": "t.csv", **fields})
