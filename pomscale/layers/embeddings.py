"""Time and position as vectors. Nothing is stored: features are computed in fp32 in every forward pass, so that
modules built on the meta device and images of any resolution just work."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# HoMM: t in [0, 1] is embedded as the step number of a 1000-step chain, with frequencies from 1 down to about 1/1000.
_NUM_TIMESTEPS = 1000


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """t (..) in [0, 1], dim even -> fp32 (.. dim): [cos, sin](1000 t f_i), f_i = 1000^(-2i / dim), i < dim / 2."""
    index = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    # In HoMM's order of operations: angles go up to 1000, where the last bit of a frequency shows in an output.
    frequencies = torch.exp(-2 * math.log(_NUM_TIMESTEPS) * index / dim)
    angles = _NUM_TIMESTEPS * t.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """t (..) in [0, 1] -> (.. d) in the dtype of the weights: features, Linear to 4d, SiLU, Linear to d."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.dim).to(self.expand.weight.dtype)
        return self.contract(nn.functional.silu(self.expand(features)))


def sincos_positions_2d(height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(height * width, dim) of a grid in row-major order: x half, then y half, each [sin, cos](pi (2i + 1) p).

    i < dim / 4; p runs from 0 to 1 along the axis at any resolution. Raises ValueError if 4 does not divide dim.
    """
    if dim % 4:
        raise ValueError(f"dim: 2-D positions need a multiple of 4, got {dim}")
    odd = 2 * torch.arange(dim // 4, dtype=torch.float32, device=device) + 1

    def features(length: int) -> Tensor:
        # In HoMM's order of operations, for the same reason as the frequencies of time.
        angles = torch.linspace(0, 1, length, dtype=torch.float32, device=device)[:, None] * odd * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    x = features(width)[None, :].expand(height, width, dim // 2)
    y = features(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([x, y], dim=-1).flatten(0, 1).to(dtype)
