"""Conditions of `source.where`: rules by which rows of a source are taken, each on one column.

`>= 5`, `> 5`, `<= 5`, `< 5`, `0.5..10` (both included) and a number compare numbers; `true` and `false` compare truth
values; any other text is the whole value, `!= text` any other value; a list is one of several values.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

Plain = StrictBool | StrictInt | StrictFloat | StrictStr
Rule = Plain | list[Plain]
"""A condition as a recipe has it."""

Condition = Callable[[Any], bool]
"""Return whether a value meets a rule. Raises UnusableValueError."""

_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_COMPARISON = re.compile(rf"(>=|>|<=|<){_NUMBER}")
_INTERVAL = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_TRUTH = {"true": True, "false": False}


class UnusableValueError(Exception):
    """A value cannot be compared. The message is the end of a sentence such as "its score is missing"."""


def parse_rule(rule: Rule) -> Condition:
    """Return the condition that a rule stands for. Raises ValueError if it is none."""
    if isinstance(rule, list):
        if not rule:
            raise ValueError("an empty list: no value is one of none")
        conditions = [_equal(value) for value in rule]
        return lambda value: any([condition(value) for condition in conditions])
    if not isinstance(rule, str):
        return _equal(rule)
    if (match := _COMPARISON.fullmatch(rule)) is not None:
        compare, limit = _OPERATORS[match[1]], float(match[2])
        return lambda value: compare(_number(value), limit)
    if (match := _INTERVAL.fullmatch(rule)) is not None:
        low, high = float(match[1]), float(match[2])
        if low > high:
            raise ValueError(f"{rule!r}: its lower end is above its upper end")
        return lambda value: low <= _number(value) <= high
    if rule.startswith("!="):
        equal = _equal(rule[2:].strip())
        return lambda value: not equal(value)
    return _equal(rule)


def _equal(wanted: Plain) -> Condition:
    if isinstance(wanted, bool):
        return lambda value: _truth(value) is wanted
    if isinstance(wanted, int | float):
        if not math.isfinite(wanted):
            raise ValueError(f"{wanted} is no number to compare with")
        return lambda value: _number(value) == wanted
    if wanted[:1] in {"<", ">", "=", "!"} or ".." in wanted or not wanted:
        raise ValueError(
            f"{wanted!r} is no rule: write a number or a text as the whole value, '>= 5', '> 5', '<= 5', '< 5', "
            f"'0.5..10', '!= text', or a list of values"
        )
    return lambda value: _text(value) == wanted


def _number(value: Any) -> float:
    _check_present(value)
    is_number = re.fullmatch(_NUMBER, value) if isinstance(value, str) else not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UnusableValueError(f"{value!r:.40} is no number")
    return number


def _truth(value: Any) -> bool:
    _check_present(value)
    truth = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(truth, bool):
        raise UnusableValueError(f"{value!r:.40} is neither true nor false")
    return truth


def _text(value: Any) -> str:
    _check_present(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableValueError(f"{value!r:.40} is no text")
    return str(value).strip()


def _check_present(value: Any) -> None:
    if is_missing(value):
        raise UnusableValueError("is missing")


def is_missing(value: Any) -> bool:
    """Return whether a row has no value in a column."""
    # NaN: tables of numbers have nothing else for it.
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
