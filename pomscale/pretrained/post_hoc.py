"""Post-hoc EMA: an average of any length from snapshots of two (Karras et al. 2024, "EDM2", arXiv 2312.02696).

An average at time T weighs what the weights were at time tau by a profile p(tau), 0 <= tau <= T, of integral 1; a
power-function average by p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1). Averages being linear, a sum of snapshots with
coefficients x has the profile sum_i x_i p_i. The coefficients that bring it closest to a wanted profile, in the L2
norm, come from the inner products of profiles (section 3.2, appendix C, algorithm 3).

We also demand sum_i x_i = 1, so that what does not move during training comes out as it is. Times are in samples. One
step of training averages p over `global_batch` samples, which can only make two profiles more alike: the error told
here bounds that of the discrete averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pomscale.engine.averages import power_exponent

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


@dataclass(frozen=True)
class PowerProfile:
    """(exponent + 1) tau^exponent / time^(exponent + 1) on [0, time]."""

    exponent: float
    time: float

    @classmethod
    def of_width(cls, width: float, time: float) -> PowerProfile:
        """width: standard deviation over time, EDM2's sigma_rel, below 12^(-1/2)."""
        return cls(power_exponent(width), time)

    def inner_product(self, other: PowerProfile) -> float:
        """The integral of the product."""
        early, late = sorted((self, other), key=lambda profile: profile.time)
        a, b = early.exponent, late.exponent
        return (a + 1) * (b + 1) / (a + b + 1) * (early.time / late.time) ** b / late.time

    def norm_squared(self) -> float:
        return self.inner_product(self)


@dataclass(frozen=True)
class ExponentialProfile:
    """Proportional to 2^((tau - time) / halflife) on [0, time]."""

    halflife: float
    time: float

    def inner_product(self, other: PowerProfile) -> float:
        """By Gauss-Legendre quadrature over u = (tau / other.time)^(exponent + 1), which makes the power constant."""
        tau = other.time * (0.5 * (_NODES + 1)) ** (1 / (other.exponent + 1))
        return float(0.5 * _WEIGHTS @ np.exp(self._rate * (tau - self.time)) * self._scale)

    def norm_squared(self) -> float:
        return self._scale**2 * -math.expm1(-2 * self._rate * self.time) / (2 * self._rate)

    @property
    def _rate(self) -> float:
        return math.log(2) / self.halflife

    @property
    def _scale(self) -> float:
        return self._rate / -math.expm1(-self._rate * self.time)


class Profile(Protocol):
    """What can be asked for: its inner products with power functions, and with itself."""

    def inner_product(self, other: PowerProfile) -> float: ...

    def norm_squared(self) -> float: ...


@dataclass(frozen=True)
class Fit:
    """Coefficients of the snapshots, in their order, and |sum_i x_i p_i - p| / |p| of what they make."""

    coefficients: tuple[float, ...]
    relative_error: float


def fit(snapshots: Sequence[PowerProfile], wanted: Profile) -> Fit:
    """Least squares under the constraint sum_i x_i = 1, in float64. `wanted` should end where a snapshot does."""
    count = len(snapshots)
    gram = np.array([[a.inner_product(b) for b in snapshots] for a in snapshots])
    right = np.array([wanted.inner_product(a) for a in snapshots])
    # Profiles of equal norm: late snapshots are as wide as early ones in relative time only.
    scale = 1 / np.sqrt(gram.diagonal())
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram * np.outer(scale, scale)
    system[:count, count] = system[count, :count] = scale / scale.max()
    solution, *_ = np.linalg.lstsq(system, np.append(right * scale, 1 / scale.max()), rcond=None)
    x = solution[:count] * scale
    squared = x @ gram @ x - 2 * x @ right + wanted.norm_squared()
    return Fit(tuple(x.tolist()), math.sqrt(max(0.0, squared) / wanted.norm_squared()))
