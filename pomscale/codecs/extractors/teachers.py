"""Features of a frozen teacher, token by token, for representation alignment (REPA, Yu et al., arXiv 2410.06940).

A teacher gives a map of features of a picture. `FeatureEncoder` brings the maps to the grid of a recipe, once, when
they are stored, so that training computes nothing of them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import Teacher

# Part of the identity; raise it where the same map gives other features: `resized_map`, or the choice of frames.
_VERSION = "features 1"


class FeatureEncoder:
    """Turns pictures and clips into the features that are stored of them: a teacher's, on one grid."""

    def __init__(self, teacher: Teacher, grid: tuple[int, ...] | None) -> None:
        """Use a teacher. grid: (rows, columns) or (frame groups, rows, columns); None for the teacher's own."""
        self.teacher = teacher
        self._grid = grid

    def grid(self, *size: int) -> tuple[int, ...]:
        """Return the grid of pictures of (height, width) or clips of (frames, height, width) in pixels.

        Raises InputError if the teacher does not take such pictures, or the clips have fewer frames than the grid.
        """
        *frames, height, width = size
        _, *own = self.teacher.map_shape(height, width)
        grid = tuple(own) if self._grid is None else self._grid
        if frames and grid[0] > frames[0]:
            raise InputError(f"features.grid: {grid[0]} frame groups of clips of {frames[0]} frames; ask for fewer")
        return grid

    def dim(self, height: int, width: int) -> int:
        """Return the values of a token, of pictures of a size in pixels."""
        return self.teacher.map_shape(height, width)[0]

    def encode(self, media: Tensor) -> Tensor:
        """Return features (b, n, d) fp32 on the teacher's device, n the product of the grid, in row-major order.

        Args:
            media: Pictures (b, c, h, w) or clips (b, c, f, h, w), uint8.
        """
        grid = self.grid(*media.shape[2:])
        if media.ndim == 4:
            return _tokens(self.teacher.feature_map(media), grid)
        frames = media[:, :, middle_frames(media.shape[2], grid[0])].transpose(1, 2)
        tokens = _tokens(self.teacher.feature_map(frames.flatten(0, 1)), grid[1:])
        return tokens.unflatten(0, (len(media), grid[0])).flatten(1, 2)

    def identity(self) -> str:
        """Return the sha256 (hex) of network, weights and preprocessing, and of what is done with the maps."""
        return hashlib.sha256(f"{_VERSION} {self.teacher.identity}".encode()).hexdigest()


def middle_frames(num_frames: int, num_groups: int) -> list[int]:
    """Return the frame in the middle of each of `num_groups` near-even groups of a clip's frames."""
    return [(2 * group + 1) * num_frames // (2 * num_groups) for group in range(num_groups)]


def _tokens(feature_map: Tensor, grid: tuple[int, ...]) -> Tensor:
    return resized_map(feature_map, grid).flatten(2).transpose(1, 2)


def resized_map(feature_map: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return a map (b, d, h, w) on another grid (rows, columns), axis by axis.

    Where an axis gets shorter, a value is the mean over the area of the new cell; where it gets longer, bilinear.
    """
    for axis, size in zip((-2, -1), grid, strict=True):
        feature_map = _resized_axis(feature_map.transpose(axis, -1), size).transpose(axis, -1)
    return feature_map


def _resized_axis(values: Tensor, size: int) -> Tensor:
    before = values.shape[-1]
    if size == before:
        return values
    if size > before:
        shape = (values.shape[-2], size)
        return interpolate(values, shape, mode="bilinear", align_corners=False)
    # Overlap of new cell i, [i, i + 1) before / size, with old cell j, [j, j + 1), as a share of the new one.
    edges = torch.arange(size + 1, dtype=torch.float64) * before / size
    old = torch.arange(before, dtype=torch.float64)
    overlap = (torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)).clamp_min(0)
    return values @ (overlap * size / before).T.to(values)


def grid_of_tokens(num_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Return rows and columns of so many square patches of a picture; None if they fill no such grid."""
    rows = math.isqrt(num_tokens * height // width)
    columns = num_tokens // rows if rows else 0
    return (rows, columns) if rows * columns == num_tokens and rows * width == columns * height else None
