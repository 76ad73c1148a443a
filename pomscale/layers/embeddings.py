"""Time and position as vectors, and positions as integers.

Nothing is stored: features are computed in fp32 in every forward pass, so that modules built on the meta device and
images of any resolution work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# HoMM: t in [0, 1] is embedded as the step number of a 1000-step chain, with frequencies from 1 down to about 1/1000.
_NUM_TIMESTEPS = 1000

# JiT: so many features of a time from 0 to 1, with frequencies from 1 down to about 1/10000.
_NUM_FRACTION_FEATURES = 256

# Vaswani et al. 2017: wavelengths of a sequence's positions go up to 10000 times 2 pi.
_LONGEST_PERIOD = 10_000


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Embed t (..) in [0, 1] as (.. dim) fp32: [cos, sin](1000 t f_i), f_i = 1000^(-2i / dim), i < dim / 2."""
    index = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    # In HoMM's order of operations: angles go up to 1000, where the last bit of a frequency shows in an output.
    frequencies = torch.exp(-2 * math.log(_NUM_TIMESTEPS) * index / dim)
    angles = _NUM_TIMESTEPS * t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Map t (..) in [0, 1] -> (.. d) in the dtype of the weights: features, Linear to 4d, SiLU, Linear to d."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.dim).to(self.expand.weight.dtype)
        return self.contract(nn.functional.silu(self.expand(features)))


class DataFractionEmbedding(nn.Module):
    """Map t (..) in [0, 1] -> (.. d) as JiT does: 256 features, Linear to d, SiLU, Linear to d.

    JiT's time is 1 for data and ours for noise, so the features are [cos, sin]((1 - t) f_i), f_i = 10000^(-i / 128):
    this is the one place where a network with weights of JiT takes 1 - t.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(_NUM_FRACTION_FEATURES, dim)
        self.contract = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = _wave_angles(1 - t.float(), _NUM_FRACTION_FEATURES // 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.expand.weight.dtype)
        return self.contract(nn.functional.silu(self.expand(features)))


class InContextTokens(nn.Module):
    """Map the embedding of a class (b d) -> tokens (b k d): the same for each, plus a learned vector of its own."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(num_tokens, dim).normal_(0, 0.02))

    def forward(self, of_class: Tensor) -> Tensor:
        return of_class[:, None] + self.positions


def sincos_positions_2d(
    height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype, *, integer: bool = False
) -> Tensor:
    """Embed a grid in row-major order (height * width, dim): x half, then y half, each [sin, cos] of angles.

    The angles of i < dim / 4 are pi (2i + 1) p, where p runs from 0 to 1 along the axis at any resolution (HoMM), or
    with `integer` n 10000^(-i / (dim / 4)), where n counts columns or rows (JiT). Raises ValueError if 4 does not
    divide dim.
    """
    if dim % 4:
        raise ValueError(f"dim: 2-D positions need a multiple of 4, got {dim}")
    of_side = _features_of_integers if integer else _features_of_side
    x = of_side(width, dim // 2, device)[None, :].expand(height, width, dim // 2)
    y = of_side(height, dim // 2, device)[:, None].expand(height, width, dim // 2)
    return torch.cat([x, y], dim=-1).flatten(0, 1).to(dtype)


def _features_of_integers(length: int, dim: int, device: torch.device) -> Tensor:
    """Embed one axis as fp32 (length, dim): [sin, cos](n 10000^(-i / m)), i < m = dim / 2; n counts from 0."""
    angles = _wave_angles(torch.arange(length, dtype=torch.float32, device=device), dim // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _wave_angles(numbers: Tensor, num_waves: int) -> Tensor:
    """Return n 10000^(-i / num_waves), i < num_waves, for fp32 numbers n (..) -> (.. num_waves)."""
    index = torch.arange(num_waves, dtype=torch.float32, device=numbers.device)
    return numbers[..., None] * torch.exp(-math.log(_LONGEST_PERIOD) * index / num_waves)


def _features_of_side(length: int, dim: int, device: torch.device) -> Tensor:
    """Embed one axis as fp32 (length, dim): [sin, cos](pi (2i + 1) p), i < dim / 2; p runs from 0 to 1."""
    odd = 2 * torch.arange(dim // 2, dtype=torch.float32, device=device) + 1
    # In HoMM's order of operations, for the same reason as the frequencies of time.
    angles = torch.linspace(0, 1, length, dtype=torch.float32, device=device)[:, None] * odd * math.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_positions_3d(
    groups: Tensor,
    height: int,
    width: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    integer: bool = False,
) -> Tensor:
    """Embed tokens in row-major order (b, g * height * width, dim), of frame groups numbered `groups` (b, g) int64.

    x and y as in `sincos_positions_2d`, on a third of the channels each; the rest tells the group: [sin, cos](n f_i),
    f_i = 10000^(-i / m), i < m. Groups are counted from the beginning of time, whatever a clip's length or start, so
    that a position means the same in all clips. Raises ValueError if 4 does not divide dim.
    """
    if dim % 4:
        raise ValueError(f"dim: 3-D positions need a multiple of 4, got {dim}")
    side = dim // 6 * 2
    angles = _wave_angles(groups.to(device, torch.float32), (dim - 2 * side) // 2)
    time = torch.cat([angles.sin(), angles.cos()], dim=-1)
    size = (*groups.shape, height, width)
    of_side = _features_of_integers if integer else _features_of_side
    x = of_side(width, side, device).expand(*size, side)
    y = of_side(height, side, device)[:, None].expand(*size, side)
    t = time[:, :, None, None].expand(*size, dim - 2 * side)
    return torch.cat([x, y, t], dim=-1).flatten(1, 3).to(dtype)


def grid_positions(
    height: int, width: int, groups: Tensor | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Number the tokens of a grid in row-major order, int64, as rotary positions need them.

    Args:
        height: tokens along a column.
        width: tokens along a row.
        groups: numbers (g,) or (b g) int64 of frame groups; None = a picture.
        device: device of the result where there are no groups.

    Returns:
        (height * width, 2): row and column; with groups (g * height * width, 3), or (b ..) with groups (b g): frame
        group, row and column.
    """
    device = device if groups is None else groups.device
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device).expand(height, width)
    grid = torch.stack([rows, columns], dim=-1)  # (height width 2)
    if groups is None:
        return grid.flatten(0, 1)
    size = (*groups.shape, height, width)
    numbers = groups[..., None, None, None].expand(*size, 1)
    return torch.cat([numbers, grid.expand(*size, 2)], dim=-1).flatten(-4, -2)
