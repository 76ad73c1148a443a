"""Times of a sampler's steps: uniform, shifted by resolution, EDM's, or an explicit list."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.options import SamplingOptions

EDM_SIGMA_MIN, EDM_SIGMA_MAX = 0.002, 80.0
"""Ends of EDM's grid, as sigma / alpha (Karras et al. 2022, table 1)."""


def sampling_times(objective: Objective, options: SamplingOptions) -> Tensor:
    """Return (num_steps + 1,) fp32, strictly decreasing to 0, for resolved options.

    Raises:
        InputError: Two times are the same number in fp32, which the network reads.
    """
    times = _times(objective, options).float()
    if not bool((times.diff() < 0).all()):
        raise InputError(
            f"sampling: two of {options.num_steps} steps on the grid {options.grid} begin at the same time in fp32; "
            "take fewer steps or a milder shift or rho"
        )
    return times


def _times(objective: Objective, options: SamplingOptions) -> Tensor:
    if options.times is not None:
        return torch.tensor(options.times, dtype=torch.float64)
    if options.grid == "rho":
        assert options.rho is not None, "the options are resolved"
        return _edm(objective, options.num_steps, options.rho)
    uniform = objective.time_grid(options.num_steps)
    if options.shift is None:
        return uniform
    # With n times the pixels, averages over them leave sqrt(n) times less noise: the same picture is lost at a sigma /
    # alpha that is sqrt(n) = s / s0 times larger (Esser et al. 2024, section 5.3.2).
    return objective.time_of(objective.alpha(uniform), options.shift * objective.sigma(uniform))


def _edm(objective: Objective, num_steps: int, rho: float) -> Tensor:
    """Return EDM's grid (Karras et al. 2022, equation 5), whose sigma is ours over alpha."""
    ends = EDM_SIGMA_MAX ** (1 / rho), EDM_SIGMA_MIN ** (1 / rho)
    sigma = torch.linspace(*ends, num_steps, dtype=torch.float64) ** rho
    times = objective.time_of(torch.ones_like(sigma), sigma)
    return torch.cat([times, times.new_zeros(1)])


def start_of(objective: Objective, noise: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[0] that sampling starts from, where no data is known.

    It is sigma times the noise. Where a grid begins as the objective's own does, that is sigma of t = 1, also for eps,
    which begins just before.
    """
    begins_with_noise = float(times[0]) >= float(objective.time_grid(1).float()[0])
    t = torch.ones_like(times[0]) if begins_with_noise else times[0]
    return objective.sigma(t).to(noise) * noise
