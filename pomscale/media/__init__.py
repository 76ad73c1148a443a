"""Pictures and clips: which files they are, the shape that each gets, and the error for those that cannot be used.

The modules decode (pictures, clips) and encode (sheets: PNG grids, contact sheets and growing clips; mp4).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Literal

Filter = Literal["lanczos", "area"]
PictureFilter = Literal["lanczos", "area", "adm"]

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
CLIP_EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")


def extension(path: str) -> str:
    """Return the last extension of a path in lower case, with its dot; '' if there is none."""
    return os.path.splitext(path)[1].lower()


class UnreadableMediaError(Exception):
    """One picture or clip cannot be used. The message is the reason, on one line."""

    @classmethod
    def of(cls, error: BaseException) -> UnreadableMediaError:
        """Return the error whose reason is what a decoder raised."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split()))


def nearest_bucket(size: tuple[float, ...], targets: Sequence[tuple[int, ...]]) -> int:
    """Return the index of the target whose aspect ratio is nearest to that of `size`, on a logarithmic scale.

    Only height and width, the last two numbers of either, count. Of equally near ones the larger in area is chosen,
    of equally large ones the first.
    """

    def rank(index: int) -> tuple[float, int, int]:
        height, width = targets[index][-2:]
        # Rounded: 1:2 and 2:1 are equally far from 1:1, and stay so in floating point.
        distance = abs(math.log((size[-1] * height) / (size[-2] * width)))
        return round(distance, 9), -height * width, index

    return min(range(len(targets)), key=rank)
