"""Objectives: what the network predicts on the path from data (t = 0) to noise (t = 1), and the loss.

A path is x_t = alpha(t) x0 + sigma(t) eps. What the network predicts leads to (x0, eps) and to the slope of an ordinary
differential equation dy/ds = f, in whose y the noise has the weight s: one of both is all that a sampler needs to know
(DDIM, Song et al. 2021, equation 14; flow matching, Lipman et al. 2023; JiT, Li & He 2025, arXiv 2511.13720):

    flow:  predicts v = eps - x0;  y = x,            s = t,                   f = v
    eps:   predicts eps;           y = x / alpha(t), s = sigma(t) / alpha(t), f = eps
    x:     predicts x0;            y = x,            s = sigma(t),            f = (x - x0) / sigma(max(t, clamp))

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
from pomscale.config.train import DEFAULT_CLAMP, DEFAULT_NOISE_SCALE, DiffusionConfig

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents (b, ...), t (b,) or (b, g), condition) -> prediction (b, ...)."""


class Objective(Protocol):
    """A path, the target on it with its weight in the loss, and its sampling equation."""

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

    def error_scale(self, t: Tensor) -> Tensor | None:
        """Return the factor on the error of a prediction at t in the loss; None = 1 at all times."""
        ...

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x0, eps) that the prediction implies at x = x_t."""
        ...

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Return dy/ds of the sampling equation that the prediction implies at x = x_t."""
        ...

    def to_ode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, s) of the sampling equation; in y the noise has the weight s."""
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

    def error_scale(self, t: Tensor) -> None:
        return None

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        return x - t * prediction, x + (1 - t) * prediction

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

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

    def error_scale(self, t: Tensor) -> None:
        return None

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        return (x - self.sigma(t) * prediction) / self.alpha(t), prediction

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

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


class XPrediction:
    """Data prediction: x_t = (1 - t) x0 + t noise_scale eps, and the loss in the velocity (JiT).

    The velocity v = (x_t - x0) / max(t, clamp) is that of the prediction and of the target alike, so the error of a
    prediction counts 1 / max(t, clamp) times. Samplers that follow the slope divide by the same, as the authors' do; at
    t < clamp they therefore go slower than the path does, and keep a share of its last noise. Samplers that mix x0 and
    eps take the prediction as it is. Guidance on x0 and on v are the same, since both share x_t, t and the clamp.
    """

    name = "x"

    def __init__(self, clamp: float = DEFAULT_CLAMP, noise_scale: float = DEFAULT_NOISE_SCALE) -> None:
        self.clamp = clamp
        self.noise_scale = noise_scale

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.noise_scale * t

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return x0

    def error_scale(self, t: Tensor) -> Tensor:
        return 1 / t.clamp_min(self.clamp)

    def decompose(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        t = expand_time(t, x)
        x0 = prediction.to(x.dtype)
        return x0, (x - self.alpha(t) * x0) / self.sigma(t)

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return (x - prediction) / self.sigma(expand_time(t, x).clamp_min(self.clamp))

    def to_ode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.sigma(expand_time(t, x))

    def from_ode(self, y: Tensor, t: Tensor) -> Tensor:
        return y

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (self.noise_scale * alpha + sigma)

    def time_grid(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


OBJECTIVES: dict[str, type[FlowMatching] | type[EpsPrediction] | type[XPrediction]] = {
    "flow": FlowMatching,
    "eps": EpsPrediction,
    "x": XPrediction,
}


def build_objective(config: DiffusionConfig) -> Objective:
    """Return the objective that a recipe names."""
    if config.objective == "x":
        assert config.clamp is not None, "the recipe fills it in"
        assert config.noise_scale is not None, "the recipe fills it in"
        return XPrediction(config.clamp, config.noise_scale)
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

    The error is weighted by the objective's `error_scale`.

    part: picks from a target (b, ...) what the network predicts, if that is not all of it. The loss is then this
    part's share of the mean: the sum over all parts is the loss of the sample.
    """
    return prediction_loss(objective, network(interpolate(objective, x0, eps, t), t, condition), x0, eps, t, part)


def prediction_loss(
    objective: Objective,
    prediction: Tensor,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    part: Callable[[Tensor], Tensor] = lambda target: target,
) -> Tensor:
    """Return the training loss of a prediction, (b,) fp32; see `per_sample_loss`."""
    error = prediction.float() - part(objective.target(x0, eps)).float()
    scale = objective.error_scale(t)
    if scale is not None:
        error = error * part(expand_time(scale, x0).expand_as(x0))
    return error.square().flatten(1).sum(1) / math.prod(x0.shape[1:])
