"""What pictures and clips have in common: how one of them is told to be unusable, and what is cut out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from PIL import Image

Filter = Literal["lanczos", "area"]
FILTERS: dict[Filter, Image.Resampling] = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}


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


def central_box(size: tuple[float, float], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest central box with the target's aspect ratio.

    Sizes are (height, width). Its corner lies on whole pixels, so that what has the right size already is not blurred.
    """
    height, width = size
    if height * target[1] <= width * target[0]:
        box_height, box_width = height, height * target[1] / target[0]
    else:
        box_height, box_width = width * target[0] / target[1], width
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
