"""Euler: first order in the sampling equation dy/ds = slope."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers.types import Denoiser


def euler(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by one network evaluation per step."""
    for t, t_next in pairwise(times.to(x.device)):
        y, s = objective.to_ode(x, t)
        _, s_next = objective.to_ode(x, t_next)
        slope = objective.slope(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        x = objective.from_ode(y + (s_next - s) * slope, t_next)
    return x
