"""Mean and covariance of features that arrive in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


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
        """Add vectors (b, d) of any floating dtype."""
        x = np.asarray(features, dtype=np.float64)
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def merge(self, other: Moments) -> None:
        """Add the vectors of `other`, which has the same d."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def mean(self) -> Float64:
        """Return the mean (d,)."""
        return self.total / self.count

    def covariance(self) -> Float64:
        """Return the unbiased covariance (d, d), divided by n - 1 as by numpy.cov; needs n >= 2."""
        mean = self.mean()
        centred = self.outer - self.count * np.outer(mean, mean)
        return centred / (self.count - 1)
