"""Euler-Maruyama: the sampling equation with noise that is added and taken away again in every step."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.draws import StepNoise
from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers.types import Denoiser


def sde(
    objective: Objective,
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by one network evaluation per step.

    For every diffusion coefficient w the equation dy = f ds - w/2 score ds + sqrt(w) dW, with s falling, has the same
    marginals as dy/ds = f (SiT, Ma et al. 2024, section 2). In y the noise has the weight s, so the score is -eps / s.
    With w = 2 eta s, which for eta = 1 is the choice of REPA's sampler,

        y_next = y + ds (f + eta eps) + sqrt(2 eta s |ds|) noise.

    The last step is one of Euler's, since noise that it added would stay.
    """
    for step, (t, t_next) in enumerate(pairwise(times.to(x.device))):
        y, s = objective.to_ode(x, t)
        _, s_next = objective.to_ode(x, t_next)
        prediction = denoise(x, t.to(x.dtype).expand(len(x)))
        slope = objective.slope(x, t, prediction)
        if eta == 0 or t_next == 0:
            x = objective.from_ode(y + (s_next - s) * slope, t_next)
            continue
        assert step_noise is not None, "eta > 0 needs noise"
        _, eps = objective.decompose(x, t, prediction)
        added = math.sqrt(2 * eta * float(s) * float(s - s_next))
        drift = (s_next - s) * (slope + eta * eps)
        x = objective.from_ode(y + drift + added * step_noise(step).to(x), t_next)
    return x
