"""Heun: second order in the sampling equation (EDM, Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers.types import Denoiser


def heun(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by two network evaluations per step.

    A step that ends at t = 0 is an Euler step, as in EDM: no network was trained on data without noise.
    """
    for t, t_next in pairwise(times.to(x.device)):
        y, s = objective.to_ode(x, t)
        _, s_next = objective.to_ode(x, t_next)
        slope = objective.slope(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        x = objective.from_ode(y + (s_next - s) * slope, t_next)
        if t_next > 0:
            slope_next = objective.slope(x, t_next, denoise(x, t_next.to(x.dtype).expand(len(x))))
            x = objective.from_ode(y + (s_next - s) * (slope + slope_next) / 2, t_next)
    return x
