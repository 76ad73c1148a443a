"""A curve in characters: braille patterns, two dots wide and four high each."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLANK = 0x2800
# Of the dot in a row and column of a character.
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_DECADE = 10.0


def plot(places: Sequence[float], values: Sequence[float], width: int, height: int) -> list[str]:
    """Lines of text, `height` of `width` characters: means over the dots' columns, joined up; "" without a number.

    The highest and the lowest of them stand at the left. Values that are all positive and span more than a decade are
    shown by their logarithm.
    """
    known = [(place, value) for place, value in zip(places, values, strict=True) if math.isfinite(value)]
    if not known:
        return [""] * height
    highest, lowest = max(value for _, value in known), min(value for _, value in known)
    by_logarithm = lowest > 0 and highest / lowest > _DECADE
    labels = [f"{highest:.4g}", *[""] * (height - 2), f"{lowest:.4g}"]
    margin = max(map(len, labels)) + 1
    columns = _columns(known, 2 * max(1, width - margin))
    scaled = {column: math.log(value) if by_logarithm else value for column, value in columns.items()}
    curve = _draw(scaled, max(1, width - margin), height)
    return [label.rjust(margin - 1) + " " + line for label, line in zip(labels, curve, strict=True)]


def _columns(known: Sequence[tuple[float, float]], num_columns: int) -> dict[int, float]:
    """Mean value by column of dots; columns without one are left out."""
    first, last = known[0][0], known[-1][0]
    found: dict[int, list[float]] = {}
    for place, value in known:
        share = (place - first) / (last - first) if last > first else 0.0
        found.setdefault(round(share * (num_columns - 1)), []).append(value)
    return {column: sum(values) / len(values) for column, values in sorted(found.items())}


def _draw(columns: dict[int, float], width: int, height: int) -> list[str]:
    highest, lowest = max(columns.values()), min(columns.values())
    num_rows = 4 * height
    cells = [[_BLANK] * width for _ in range(height)]
    before: int | None = None
    for column, value in columns.items():
        share = (highest - value) / (highest - lowest) if highest > lowest else 0.5
        row = round(share * (num_rows - 1))
        # Up or down from the dot before it, so that the curve has no gaps.
        way = [row] if before is None else range(min(before, row), max(before, row) + 1)
        for dot in way:
            cells[dot // 4][column // 2] |= _DOT[dot % 4][column % 2]
        before = row
    return ["".join(map(chr, line)).rstrip(chr(_BLANK)) for line in cells]
