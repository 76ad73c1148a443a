"""Midpoint: second order in the sampling equation dy/ds = slope."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers.types import Denoiser


def midpoint(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by two network evaluations per step.

    The network is never asked at t = 0, so the last step is of second order, too.
    """
    for t, t_next in pairwise(times.to(x.device)):
        y, s = objective.to_ode(x, t)
        _, s_next = objective.to_ode(x, t_next)
        t_half = _half_way(objective, t, t_next)
        slope = objective.slope(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        x_half = objective.from_ode(y + (s_next - s) / 2 * slope, t_half)
        slope = objective.slope(x_half, t_half, denoise(x_half, t_half.to(x.dtype).expand(len(x))))
        x = objective.from_ode(y + (s_next - s) * slope, t_next)
    return x


def _half_way(objective: Objective, t: Tensor, t_next: Tensor) -> Tensor:
    """Return the time () at which s is half-way between its values at t and t_next.

    In y, data and noise have weights that are linear in s: y is linear in x, so the weight of data is y of alpha.
    """
    ends = t.new_tensor([float(t), float(t_next)]).double()
    alpha, sigma = objective.to_ode(objective.alpha(ends), ends)
    return objective.time_of(alpha.mean(), sigma.mean()).to(t)
