"""DDIM (Song et al. 2021, equation 12), and DDPM, which is the same with eta = 1."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from pomscale.diffusion.draws import StepNoise
from pomscale.diffusion.objectives import Objective, interpolate
from pomscale.diffusion.samplers.types import Denoiser


def ddim(
    objective: Objective,
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by one network evaluation per step.

    Estimate (x0, eps) from the prediction, then mix them again for the next time. With eta = 0 this equals Euler in
    the path's own variables on every path, but for the clamp of objective x; DDIM is the form that never divides by
    alpha of the next time. With eta > 0,
    which needs `step_noise`, a part of eps is replaced by new noise of eta times the standard deviation that x at the
    next time has given x and x0 (equation 16, on any path).
    """
    for step, (t, t_next) in enumerate(pairwise(times.to(x.device))):
        x0, eps = objective.decompose(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        if eta == 0 or t_next == 0:
            x = interpolate(objective, x0, eps, t_next)
            continue
        assert step_noise is not None, "eta > 0 needs noise"
        alpha, sigma, alpha_next, sigma_next = _weights(objective, t, t_next)
        added = eta * sigma_next / sigma * math.sqrt(sigma**2 - (alpha * sigma_next / alpha_next) ** 2)
        x = alpha_next * x0 + math.sqrt(max(0.0, sigma_next**2 - added**2)) * eps + added * step_noise(step).to(x)
    return x


def ddpm(
    objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor, *, step_noise: StepNoise | None = None
) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0], by ancestral sampling (Ho et al. 2020, algorithm 2).

    The noise has the variance of x at the next time given x and x0, so this is DDIM with eta = 1 (Song et al. 2021,
    section 4.1).
    """
    return ddim(objective, denoise, x, times, eta=1.0, step_noise=step_noise)


def _weights(objective: Objective, t: Tensor, t_next: Tensor) -> tuple[float, float, float, float]:
    """Return alpha and sigma at t, and those at t_next."""
    t, t_next = t.double(), t_next.double()
    weights = objective.alpha(t), objective.sigma(t), objective.alpha(t_next), objective.sigma(t_next)
    alpha, sigma, alpha_next, sigma_next = (float(weight) for weight in weights)
    return alpha, sigma, alpha_next, sigma_next
