"""Curves in braille characters, each of which is two dots wide and four dots high."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLANK = 0x2800
# The bit of the dot in a row and column of a character.
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_DECADE = 10.0


def plot(positions: Sequence[float], values: Sequence[float], width: int, height: int) -> list[str]:
    """Return `height` lines of `width` characters; empty lines if no value is finite.

    Each column of dots shows the mean of its values; the dots are joined. The highest and the lowest value are written
    at the left. Values that are all positive and span more than a decade are shown by their logarithm.
    """
    known = [(position, value) for position, value in zip(positions, values, strict=True) if math.isfinite(value)]
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
    """Return the mean value by column of dots; columns without values are left out."""
    first, last = known[0][0], known[-1][0]
    found: dict[int, list[float]] = {}
    for position, value in known:
        share = (position - first) / (last - first) if last > first else 0.0
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
        # Fill the rows up or down from the dot before, so that the curve has no gaps.
        way = [row] if before is None else range(min(before, row), max(before, row) + 1)
        for dot in way:
            cells[dot // 4][column // 2] |= _DOT[dot % 4][column % 2]
        before = row
    return ["".join(map(chr, line)).rstrip(chr(_BLANK)) for line in cells]
