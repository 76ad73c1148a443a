"""Mean and covariance of features that arrive in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_ASYMMETRY = 1e-6  # of the largest entry; a covariance in float32 that was not summed symmetrically has about 1e-7


@dataclass(frozen=True)
class Gaussian:
    """A mean and a covariance, checked.

    Attributes:
        mean: Mean (d,), float64.
        covariance: Covariance (d, d), float64, symmetric.
        count: Number of vectors that it was estimated from, or None if that is unknown.
    """

    mean: Float64
    covariance: Float64
    count: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if shapes do not fit, a value is not finite, or the covariance is not symmetric."""
        mean, covariance = (_as_float64(array) for array in (self.mean, self.covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            raise ValueError(f"a mean of shape {mean.shape} and a covariance of shape {covariance.shape} do not fit")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean or covariance has values that are not finite")
        asymmetry, largest = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
        if asymmetry > _ASYMMETRY * largest:
            raise ValueError(
                f"the covariance is not symmetric: entries differ by {asymmetry:.3g}, and the largest is {largest:.3g}"
            )
        if self.count is not None and self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, and there are {self.count}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", (covariance + covariance.T) / 2)

    @property
    def width(self) -> int:
        """Dimension d."""
        return len(self.mean)


def _as_float64(array: npt.NDArray[np.floating]) -> Float64:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"mean and covariance must be floating-point numbers, and one is {array.dtype}")
    return array.astype(np.float64)


@dataclass
class Moments:
    """Sums of n feature vectors and of their outer products, in float64.

    Sums of disjoint sets add, so parts that are merged in one order give one result, whoever made them.

    Attributes:
        count: n.
        total: Sum of the vectors (d,).
        outer: Sum of x x^T (d, d).
    """

    count: int
    total: Float64
    outer: Float64

    @classmethod
    def empty(cls, dim: int) -> Self:
        """Return the moments of no vectors."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: npt.ArrayLike) -> None:
        """Add vectors (b, d) of any floating dtype.

        Raises:
            ValueError: The width is another one, or a value is not finite; nothing was added then.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.total):
            raise ValueError(f"features of shape {x.shape} do not fit moments of {len(self.total)} features")
        if not np.isfinite(x).all():
            raise ValueError("features have values that are not finite")
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def merge(self, other: Moments) -> None:
        """Add the vectors of `other`. Raises ValueError if its width is another one."""
        if len(other.total) != len(self.total):
            raise ValueError(f"moments of {len(other.total)} features do not fit those of {len(self.total)}")
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def mean(self) -> Float64:
        """Return the mean (d,). Raises ValueError if there is no vector."""
        if not self.count:
            raise ValueError("a mean needs at least 1 sample, and there are none")
        return self.total / self.count

    def covariance(self) -> Float64:
        """Return the unbiased covariance (d, d), divided by n - 1 as by numpy.cov. Raises ValueError if n < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, and there are {self.count}")
        mean = self.mean()
        centred = self.outer - self.count * np.outer(mean, mean)
        return centred / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Return mean and covariance. Raises ValueError if n < 2."""
        covariance = self.covariance()
        return Gaussian(self.mean(), covariance, self.count)
