"""Objectives: what the network predicts on the path from data (t = 0) to noise (t = 1), and the loss.

A path is x_t = alpha(t) x0 + sigma(t) eps. Both objectives predict the derivative of an ordinary differential
equation dy/ds = f, which is all that a sampler needs to know (DDIM, Song et al. 2021, equation 14;
flow matching, Lipman et al. 2023):

    flow:  y = x,            s = t,                   f = v = eps - x0
    eps:   y = x / alpha(t), s = sigma(t) / alpha(t), f = eps

Shapes: x, x0, eps and predictions are (b, ...), t is (b,), a scalar tensor or, for clips (b c F H W), (b, g) with one t
for each of g groups of F / g frames; all floating dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.config.train import DiffusionConfig

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents (b, ...), t (b,) or (b, g), condition) -> prediction (b, ...)."""


class Objective(Protocol):
    """A path, the target on it, and its sampling equation."""

    name: str

    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of the data at t."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Return the weight of the noise at t."""
        ...

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the prediction that the network is trained towards."""
        ...

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x0, eps) that the prediction implies at x = x_t."""
        ...

    def to_ode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, s) of the sampling equation dy/ds = prediction."""
        ...

    def from_ode(self, y: Tensor, t: Tensor) -> Tensor:
        """Return x_t from y."""
        ...

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the t at which data and noise are mixed in the proportion alpha : sigma, both not negative."""
        ...

    def time_grid(self, num_steps: int) -> Tensor:
        """Return num_steps + 1 times from the first of sampling down to 0, float64."""
        ...


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Return t (b,), () or (b, g) in a shape that broadcasts over like (b, ...), in its dtype."""
    t = t.to(like.dtype)
    if t.ndim < 2 or t.shape[1] == 1:  # a picture is one group
        return t.reshape(-1, *([1] * (like.ndim - 1)))
    of_frames = t.repeat_interleave(like.shape[2] // t.shape[1], dim=1)
    return of_frames[:, None, :, None, None]


def interpolate(objective: Objective, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = alpha(t) x0 + sigma(t) eps."""
    t = expand_time(t, x0)
    return objective.alpha(t) * x0 + objective.sigma(t) * eps


class FlowMatching:
    """Flow matching: x_t = (1 - t) x0 + t eps; the network predicts v = eps - x0."""

    name = "flow"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps - x0

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        return x - t * prediction, x + (1 - t) * prediction

    def to_ode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, expand_time(t, x)

    def from_ode(self, y: Tensor, t: Tensor) -> Tensor:
        return y

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)

    def time_grid(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


class EpsPrediction:
    """Noise prediction: x_t = sqrt(1 - t) x0 + sqrt(t) eps, the PoM authors' linear schedule."""

    name = "eps"
    start_time = 0.999
    """Sampling starts just short of t = 1, where x / alpha(t) is not defined."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(t)

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        return (x - self.sigma(t) * prediction) / self.alpha(t), prediction

    def to_ode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        return x / self.alpha(t), self.sigma(t) / self.alpha(t)

    def from_ode(self, y: Tensor, t: Tensor) -> Tensor:
        return y * self.alpha(expand_time(t, y))

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma**2 / (alpha**2 + sigma**2)

    def time_grid(self, num_steps: int) -> Tensor:
        # With t = sin^2(theta), alpha = cos(theta) and sigma = sin(theta): uniform in theta is smooth at both
        # ends, where a grid uniform in t would take one huge step of s at t = 0 and lose a sampler its order.
        theta = torch.linspace(math.asin(math.sqrt(self.start_time)), 0, num_steps + 1, dtype=torch.float64)
        return torch.sin(theta) ** 2


OBJECTIVES: dict[str, type[FlowMatching] | type[EpsPrediction]] = {"flow": FlowMatching, "eps": EpsPrediction}


def build_objective(config: DiffusionConfig) -> Objective:
    """Return the objective that a recipe names."""
    return OBJECTIVES[config.objective]()


def per_sample_loss(
    objective: Objective,
    network: Network,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    condition: Condition,
    part: Callable[[Tensor], Tensor] = lambda target: target,
) -> Tensor:
    """Return the training loss: the mean squared error over the elements of each sample, (b,) fp32.

    part: picks from a target (b, ...) what the network predicts, if that is not all of it. The loss is then this
    part's share of the mean: the sum over all parts is the loss of the sample.
    """
    prediction = network(interpolate(objective, x0, eps, t), t, condition)
    error = prediction.float() - part(objective.target(x0, eps)).float()
    return error.square().flatten(1).sum(1) / math.prod(x0.shape[1:])
