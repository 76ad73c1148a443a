"""Reduce pictures by the mean over the area that each new pixel covers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

# Rows of uint8 whose sum fits into uint16.
_MAX_NARROW_SUM = 257


def area_mean(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Return a part of a picture in a smaller size; a pixel on the border of two areas counts in both, by its shares.

    Pillow's BOX does not share pixels: it gives each to one area, and 48 columns of which every third is white become
    32 columns of 128 and 0, not of 85. FFmpeg's AREA shares them.

    Args:
        pixels: (h, w, c) uint8.
        box: (left, top, right, bottom) of the part, in pixels and fractions of them, at least as large as `size`.
        size: Height and width of the result.

    Returns:
        (*size, c) uint8.
    """
    left, top, right, bottom = box
    first, end = int(left), int(np.ceil(right))
    rows = _mean_of_rows(pixels[:, first:end], top, bottom, size[0])
    columns = np.ascontiguousarray(rows.swapaxes(0, 1))
    return (_mean_of_rows(columns, left - first, right - first, size[1]).swapaxes(0, 1) + 0.5).astype(np.uint8)


def _mean_of_rows(pixels: np.ndarray, begin: float, end: float, count: int) -> np.ndarray:
    """Return the means (count, w, c) float32 over equal intervals of [begin, end), in rows, each of one row or more."""
    edges = np.linspace(begin, end, count + 1)
    whole = np.minimum(edges.astype(int), len(pixels) - 1)
    sums = np.empty((count, *pixels.shape[1:]), np.float32)
    for i, (first, last) in enumerate(pairwise(whole)):
        is_narrow = pixels.dtype == np.uint8 and last - first < _MAX_NARROW_SUM
        sums[i] = pixels[first:last].sum(0, dtype=np.uint16 if is_narrow else np.float32)
    # What lies before an edge in its row belongs to the interval before.
    shares = (edges - whole).astype(np.float32).reshape(-1, *[1] * (pixels.ndim - 1))
    at_edges = pixels[whole] * shares
    return (sums - at_edges[:-1] + at_edges[1:]) * np.float32(count / (end - begin))
