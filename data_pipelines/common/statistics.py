"""Mean and variance per channel, in one pass over parts that may come from different machines."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict


class ChannelStatistics(BaseModel):
    """Count, mean and sum of squared deviations per channel, in float64.

    Parts are merged pairwise (Chan, Golub, LeVeque 1979), which loses no digits where sums of squares would.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, latents: np.ndarray, stores_moments: bool) -> Self:
        """Of latents (b, c, h, w); or of moments (b, 2c, h, w), then of samples from those posteriors."""
        values = np.moveaxis(latents.astype(np.float64), 1, 0)
        values = values.reshape(len(values), -1)
        logvar = None
        if stores_moments:
            values, logvar = np.split(values, 2)
        mean = values.mean(axis=1)
        squares = ((values - mean[:, None]) ** 2).sum(axis=1)
        if logvar is not None:
            # Law of total variance: variance of the means plus mean of the variances.
            squares += np.exp(logvar).sum(axis=1)
        return cls(count=values.shape[1], mean=tuple(mean.tolist()), squares=tuple(squares.tolist()))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        count = self.count + other.count
        mine, theirs = np.array(self.mean), np.array(other.mean)
        delta = theirs - mine
        mean = mine + delta * (other.count / count)
        squares = np.array(self.squares) + np.array(other.squares) + delta**2 * (self.count * other.count / count)
        return ChannelStatistics(count=count, mean=tuple(mean.tolist()), squares=tuple(squares.tolist()))

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(np.sqrt(np.array(self.squares) / self.count).tolist())
