"""What pictures and clips have in common: how one is told to be unusable, and which shape it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Filter = Literal["lanczos", "area"]


class UnreadableMediaError(Exception):
    """One picture or clip cannot be used. The message is the reason, on one line."""

    @classmethod
    def of(cls, error: BaseException) -> UnreadableMediaError:
        """The reason is what a decoder raised."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split()))


def nearest_bucket(size: tuple[float, ...], targets: Sequence[tuple[int, ...]]) -> int:
    """The index of the target whose aspect ratio is nearest to that of `size`, on a logarithmic scale.

    Only height and width, the last two numbers of either, count. Of equally near ones the larger in area is chosen,
    of equally large ones the first.
    """

    def rank(index: int) -> tuple[float, int, int]:
        height, width = targets[index][-2:]
        # Rounded: 1:2 and 2:1 are equally far from 1:1, and stay so in floating point.
        distance = abs(math.log((size[-1] * height) / (size[-2] * width)))
        return round(distance, 9), -height * width, index

    return min(range(len(targets)), key=rank)
