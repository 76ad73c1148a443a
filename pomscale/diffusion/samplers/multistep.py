"""DPM-Solver++(2M) and UniPC-2: one network evaluation per step, and the last ones remembered.

Both solve x_next = (sigma_next / sigma) x + sigma_next int e^lambda x0 dlambda over lambda = log(alpha / sigma), with
x0 as a polynomial in lambda through the last estimates (Lu et al. 2022, arXiv 2211.01095, proposition 4.1). The factors
are written so that they are finite for lambda = -inf, where flow matching starts, and inf, where all sampling ends:

    sigma_next int e^lambda dlambda = alpha_next - alpha sigma_next / sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pomscale.diffusion.objectives import Objective
from pomscale.diffusion.samplers.types import Denoiser


@dataclass(frozen=True)
class _Grid:
    """alpha, sigma and lambda = log(alpha / sigma) at the times of sampling, in float64."""

    alpha: list[float]
    sigma: list[float]
    log_snr: list[float]

    @classmethod
    def of(cls, objective: Objective, times: Tensor) -> _Grid:
        t = times.double().cpu()
        alpha, sigma = objective.alpha(t), objective.sigma(t)
        return cls(alpha.tolist(), sigma.tolist(), (alpha.log() - sigma.log()).tolist())

    def advance(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """Return x at the end of a step if the estimate of the data were x0 all along it."""
        ratio = self.sigma[step + 1] / self.sigma[step]
        return ratio * x + (self.alpha[step + 1] - self.alpha[step] * ratio) * x0

    def ratio(self, step: int) -> float:
        """Return the length of a step over that of the step before, in lambda; 0 after a step from lambda = -inf."""
        now, before = (self.log_snr[i + 1] - self.log_snr[i] for i in (step, step - 1))
        return now / before


def dpmpp_2m(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0] by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    The first step and one that ends at t = 0 are of first order.
    """
    grid, previous = _Grid.of(objective, times), x
    for step, t in enumerate(times[:-1].to(x.device)):
        x0, _ = objective.decompose(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        estimate = x0
        if step > 0 and grid.sigma[step + 1] > 0:
            estimate = x0 + grid.ratio(step) / 2 * (x0 - previous)
        x, previous = grid.advance(x, estimate, step), x0
    return x


def unipc(objective: Objective, denoise: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Return x (b, ...) at times[-1] from x (b, ...) at times[0] by UniPC-2 (Zhao et al. 2023, with B(h) = e^h - 1).

    This is their form for data prediction (arXiv 2302.04867; variant bh2 of github.com/wl-zhao/UniPC), which takes B at
    minus the length of a step in lambda. Each prediction of the network corrects the step that led to it (UniC), and
    then predicts the next (UniP). The first step and the last are of first order, as in the authors' code and
    diffusers.
    """
    grid, num_steps = _Grid.of(objective, times), len(times) - 1
    x0s: list[Tensor] = []
    start = x
    for step, t in enumerate(times[:-1].to(x.device)):
        x0, _ = objective.decompose(x, t, denoise(x, t.to(x.dtype).expand(len(x))))
        if step > 0:
            x = grid.advance(start, _corrected(grid, step - 1, [*x0s, x0]), step - 1)
        start, x0s = x, [*x0s[-1:], x0]
        estimate = x0
        if 0 < step < num_steps - 1:
            estimate = x0 + grid.ratio(step) / 2 * (x0 - x0s[-2])
        x = grid.advance(x, estimate, step)
    return x


def _corrected(grid: _Grid, step: int, x0s: list[Tensor]) -> Tensor:
    """Return the estimate of the data that UniC takes for a step: of x0s, the last is that at the end of the step.

    For order 2 the weights of both differences of x0 solve a system of two equations (Zhao et al. 2023, theorem 3.1,
    with -h for h since x0 is predicted); this is its solution. For order 1 the weight is 1 / 2, as in their code.
    """
    *before, here, end = x0s
    if not before:
        return here + (end - here) / 2
    h = grid.log_snr[step] - grid.log_snr[step + 1]
    first = math.expm1(h) / h - 1
    second = 2 * (first / h - 1 / 2)
    first, second = first / math.expm1(h), second / math.expm1(h)
    back = -grid.ratio(step)
    outer = (second - first) * back / (1 - back)
    return here + outer * back * (before[-1] - here) + (first - outer) * (end - here)
