"""The exact network for Gaussian data, N(mu, s^2) per channel: all that sampling does has a closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.diffusion.objectives import Objective, expand_time
from pomscale.diffusion.samplers.types import Denoiser

SHAPE = (3, 4, 4)
MU = torch.tensor([0.7, -1.2, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
S = torch.tensor([0.5, 1.3, 0.9], dtype=torch.float64).view(1, 3, 1, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance(objective: Objective, t: Tensor) -> Tensor:
    """Of x_t when x0 ~ N(mu, s^2)."""
    return (objective.alpha(t) * S) ** 2 + objective.sigma(t) ** 2


def exact_denoiser(objective: Objective) -> Denoiser:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, x)
        z = (x - objective.alpha(t) * MU) / variance(objective, t)
        return objective.target(MU + objective.alpha(t) * S**2 * z, objective.sigma(t) * z)

    return denoise


def exact_solution(objective: Objective, x: Tensor, t: Tensor, t_end: Tensor | None = None) -> Tensor:
    """x at t -> x at t_end, or at 0: along a solution (x - alpha mu) / sqrt(variance) does not change."""
    t_end = torch.zeros_like(t) if t_end is None else t_end
    z = (x - objective.alpha(t) * MU) / variance(objective, t).sqrt()
    return objective.alpha(t_end) * MU + variance(objective, t_end).sqrt() * z
