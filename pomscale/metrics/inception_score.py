"""The inception score (Salimans et al. 2016), from logits that arrive in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from pomscale.metrics.moments import Float64

TORCH_FIDELITY_SEED = 2020
"""Default `rng_seed` of torch-fidelity, which shuffles samples with it, and draws KID's subsets with it."""


def assign_splits(
    num_samples: int, num_splits: int = 10, shuffle_seed: int | None = TORCH_FIDELITY_SEED
) -> npt.NDArray[np.int64]:
    """Return the split (n,) of each sample.

    Split s of S holds places s n // S up to (s + 1) n // S. The default is torch-fidelity 0.4.0's: 10 splits of
    shuffled samples, so that splits of class-sorted samples have all classes. ADM takes splits of 5,000 samples in
    order, which is shuffle_seed=None for 50,000 samples and 10 splits; its score falls if samples come class by class.

    Args:
        num_samples: Number of samples n.
        num_splits: Number of splits S.
        shuffle_seed: Seed of numpy's RandomState, whose permutation gives the places; None keeps the samples' order.

    Raises:
        ValueError: There are fewer samples than splits.
    """
    if not 1 <= num_splits <= num_samples:
        raise ValueError(f"{num_samples} samples cannot be divided into {num_splits} splits")
    places = np.arange(num_samples)
    splits = ((places + 1) * num_splits - 1) // num_samples
    if shuffle_seed is None:
        return splits
    assigned = np.empty_like(splits)
    assigned[np.random.RandomState(shuffle_seed).permutation(num_samples)] = splits
    return assigned


@dataclass
class InceptionScore:
    """Sums over each of S splits, in float64; sums of disjoint sets of samples add.

    Attributes:
        count: Samples of each split (S,).
        total: Sums of class probabilities p (S, k).
        negentropy: Sums of sum_k p_k log p_k (S,).
    """

    count: npt.NDArray[np.int64]
    total: Float64
    negentropy: Float64

    @classmethod
    def empty(cls, num_classes: int, num_splits: int = 10) -> Self:
        """Return the sums of no samples."""
        return cls(np.zeros(num_splits, np.int64), np.zeros((num_splits, num_classes)), np.zeros(num_splits))

    def add(self, logits: npt.ArrayLike, splits: npt.NDArray[np.int64]) -> None:
        """Add samples.

        Args:
            logits: Unnormalised class scores (b, k) of any floating dtype.
            splits: The samples' splits (b,), from `assign_splits`.

        Raises:
            ValueError: Shapes do not fit, or a logit is not finite; nothing was added then.
        """
        x = np.asarray(logits, dtype=np.float64)
        if x.shape != (len(splits), self.total.shape[1]):
            raise ValueError(
                f"logits of shape {x.shape} do not fit {len(splits)} samples of {self.total.shape[1]} classes"
            )
        if not np.isfinite(x).all():
            raise ValueError("logits have values that are not finite")
        shifted = x - x.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        negentropy = (p * log_p).sum(1)
        for split in np.unique(splits):
            mine = splits == split
            self.count[split] += mine.sum()
            self.total[split] += p[mine].sum(0)
            self.negentropy[split] += negentropy[mine].sum()

    def merge(self, other: InceptionScore) -> None:
        """Add the samples of `other`. Raises ValueError if it has other splits or classes."""
        if other.total.shape != self.total.shape:
            raise ValueError(f"splits and classes {other.total.shape} do not fit {self.total.shape}")
        self.count += other.count
        self.total += other.total
        self.negentropy += other.negentropy

    def score(self) -> tuple[float, float]:
        """Return mean and standard deviation (divided by S) over splits of exp E_x KL(p(y|x) || p(y)).

        Raises:
            ValueError: A split has no samples.
        """
        if not self.count.all():
            raise ValueError(f"split {int(self.count.argmin())} of {len(self.count)} has no samples")
        marginal = self.total / self.count[:, None]
        # x log x goes to 0 with x; a probability that is 0 in float64 has none.
        marginal_negentropy = (marginal * np.log(np.where(marginal > 0, marginal, 1.0))).sum(1)
        scores = np.exp(self.negentropy / self.count - marginal_negentropy)
        return float(scores.mean()), float(scores.std())
