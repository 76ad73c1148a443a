"""Rows of a source that a recipe takes, and those that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pomscale.config.where import Rule, UnusableValueError, parse_rule


class RowFilter:
    """The rules of `source.where`."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._conditions = {column: parse_rule(rule) for column, rule in rules.items()}

    @property
    def columns(self) -> list[str]:
        return list(self._conditions)

    def judge(self, row: Mapping[str, Any]) -> tuple[bool, str | None]:
        """Return whether a row is taken, and why that cannot be told, or None.

        A row that breaks one rule is left out, whatever its other values are; a row that breaks none, and has a value
        that cannot be compared, is taken with a problem.
        """
        problem = None
        for column, condition in self._conditions.items():
            try:
                if not condition(row.get(column)):
                    return False, None
            except UnusableValueError as error:
                problem = problem or f"its {column} {error}"
        return True, problem
