"""Features in blocks of rows, in float64, from arrays, memory maps or a sequence of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Features: TypeAlias = npt.NDArray[np.floating] | Sequence[npt.NDArray[np.floating]]
"""Feature vectors (n, d) of any floating dtype: an array or a memory map, or several (n_i, d) whose rows follow one
another."""

BLOCK_ROWS = 2048
"""Rows of a block. The constant decides the order of every sum, so results never depend on memory or processes."""


class Rows:
    """Rows of `Features`, read block by block and checked when they are read.

    Attributes:
        count: Number of vectors n.
        width: Their dimension d.
    """

    def __init__(self, features: Features, name: str) -> None:
        """Look at shapes and dtypes; no row is read.

        Args:
            features: The vectors.
            name: Name of the set in messages, such as "generated".

        Raises:
            ValueError: The arrays are not matrices of floating-point numbers of one width.
        """
        arrays = [features] if isinstance(features, np.ndarray) else list(features)
        if not arrays:
            raise ValueError(f"{name}: there are no features")
        for array in arrays:
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"{name}: features are {array.dtype} {array.shape}, and not floating-point (n, d)")
        widths = sorted({array.shape[1] for array in arrays})
        if len(widths) != 1:
            raise ValueError(f"{name}: parts have features of widths {widths}")
        self.width = widths[0]
        self._arrays, self._name = arrays, name
        self._ends = np.cumsum([len(array) for array in arrays])
        self.count = int(self._ends[-1])

    def blocks(self, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks (up to BLOCK_ROWS, d) from row `start`, a multiple of BLOCK_ROWS, with their rows."""
        for begin in range(start, self.count, BLOCK_ROWS):
            rows = slice(begin, min(begin + BLOCK_ROWS, self.count))
            yield rows, self.take(np.arange(rows.start, rows.stop))

    def take(self, indices: npt.NDArray[np.integer]) -> Tensor:
        """Return the rows (b, d) of these indices (b,) in float64. Raises ValueError if a value is not finite."""
        parts = np.searchsorted(self._ends, indices, side="right")
        block = np.empty((len(indices), self.width))
        for part in np.unique(parts):
            mine = parts == part
            array = self._arrays[part]
            block[mine] = array[indices[mine] - (self._ends[part] - len(array))]
        finite = np.isfinite(block).all(1)
        if not finite.all():
            raise ValueError(f"{self._name}: the features of sample {indices[~finite][0]} are not finite")
        return torch.from_numpy(block)


def read_pair(generated: Features, real: Features, at_least: int) -> tuple[Rows, Rows]:
    """Return the rows of two sets that are compared.

    Raises:
        ValueError: The widths differ, or a set has fewer than `at_least` vectors.
    """
    pair = Rows(generated, "generated"), Rows(real, "real")
    if pair[0].width != pair[1].width:
        raise ValueError(
            f"generated features have width {pair[0].width}, real ones {pair[1].width}: "
            "they are not from the same extractor"
        )
    for rows, name in zip(pair, ("generated", "real"), strict=True):
        if rows.count < at_least:
            raise ValueError(f"{name}: there are {rows.count} samples, and at least {at_least} are needed")
    return pair
