"""Deterministic DDIM (Song et al. 2021, equation 12 with zero variance)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.objectives import Objective, interpolate
from pomscale.diffusion.samplers.types import Denoiser


def ddim(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by one network evaluation per step.

    Estimate (x0, eps) from the prediction, then mix them again for the next time. On every path this equals
    Euler in the path's own variables; DDIM is the form that never divides by alpha of the next time.
    """
    for t, t_next in pairwise(times.to(x.device)):
        x0, eps = objective.decompose(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        x = interpolate(objective, x0, eps, t_next)
    return x
