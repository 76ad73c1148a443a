"""Grids of cases of which the daily suite runs half, and the exhaustive suite the whole."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from _pytest.mark import ParameterSet


def every_pair(*factors: Mapping[str, object] | Sequence[object]) -> list[ParameterSet]:
    """Return all combinations of at least three factors, as cases for `pytest.mark.parametrize`.

    Every second one, as on a chessboard, is exhaustive. The others still have each value of a factor with each value of
    any other one: two factors fix the colour of a square only together with a third. A mapping gives its values names.
    """
    assert len(factors) > 2
    assert all(len(factor) > 1 for factor in factors)
    named = [factor if isinstance(factor, Mapping) else {str(value): value for value in factor} for factor in factors]
    cases = []
    for places in itertools.product(*(range(len(factor)) for factor in factors)):
        chosen = [list(factor.items())[place] for factor, place in zip(named, places, strict=True)]
        marks = [pytest.mark.exhaustive] if sum(places) % 2 else []
        cases.append(pytest.param(*(value for _, value in chosen), marks=marks, id="-".join(key for key, _ in chosen)))
    return cases
