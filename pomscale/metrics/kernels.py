"""Distances by kernels: KID of Inception features, CMMD of CLIP embeddings; and the CLIP score of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pomscale.metrics.blocks import Features, Rows, read_pair
from pomscale.metrics.inception_score import TORCH_FIDELITY_SEED
from pomscale.metrics.moments import Float64

_KID_DEGREE, _KID_COEF0 = 3, 1.0
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Subsets:
    """Random subsets that KID is averaged over; the defaults are those of torch-fidelity 0.4.0.

    Attributes:
        count: Number of subsets.
        size: Samples of each subset, drawn without replacement from either set.
        seed: Seed of numpy's RandomState, which draws from the generated set first.
    """

    count: int = 100
    size: int = 1000
    seed: int = TORCH_FIDELITY_SEED


def kid(generated: Features, real: Features, subsets: Subsets | None = None) -> tuple[float, float]:
    """Return the kernel inception distance (Binkowski et al. 2018) and its standard deviation over subsets.

    KID is the unbiased estimate of the squared MMD with the kernel (x y / d + 1)^3; it may be slightly negative. By
    default it takes all samples at once, and the deviation is 0. torch-fidelity, torchmetrics and clean-fid take the
    mean over 100 random subsets of 1,000; its expectation is the same, its noise is larger, and the deviation tells
    the spread of subsets, and not the error of the mean.

    Args:
        generated: Features (n, d).
        real: Features (m, d).
        subsets: The subsets; None takes all samples.

    Raises:
        ValueError: Features do not fit or are not finite, or a set has fewer samples than 2 or than a subset.
    """
    if subsets is None:
        return _kid_of_all(*read_pair(generated, real, at_least=2)), 0.0
    if subsets.size < 2 or subsets.count < 1:
        raise ValueError(f"KID needs 1 subset of 2 samples at least, and not {subsets.count} of {subsets.size}")
    ours, theirs = read_pair(generated, real, at_least=subsets.size)
    random = np.random.RandomState(subsets.seed)
    values = []
    for _ in range(subsets.count):
        x = ours.take(random.choice(ours.count, subsets.size, replace=False))
        y = theirs.take(random.choice(theirs.count, subsets.size, replace=False))
        values.append(_kid_of_all(Rows(x.numpy(), "generated"), Rows(y.numpy(), "real")))
    return float(np.mean(values)), float(np.std(values))


def _kid_of_all(x: Rows, y: Rows) -> float:
    """Return the estimator MMD_u^2 of Gretton et al. (2012), eq. 3."""
    n, m = x.count, y.count
    within_x = _sum_within(x, _cubic) - _sum_cubic_diagonal(x)
    within_y = _sum_within(y, _cubic) - _sum_cubic_diagonal(y)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _sum_between(x, y, _cubic) / (n * m)


def cmmd(generated: Features, real: Features) -> float:
    """Return the CLIP maximum mean discrepancy (Jayasumana et al. 2024).

    As in its reference code, embeddings have unit norm (they are normalised here), the kernel is Gaussian with
    sigma 10, the estimate of the squared MMD is the biased one (eq. 5 of Gretton et al. 2012, with the diagonal), and
    it is multiplied by 1000. The kernel of unit vectors is at least exp(-0.02), so the bias is below 20 (1/n + 1/m).

    Args:
        generated: CLIP image embeddings (n, d).
        real: CLIP image embeddings (m, d).

    Raises:
        ValueError: Embeddings do not fit, are not finite, or one is 0.
    """
    x, y = read_pair(generated, real, at_least=1)
    within = _sum_within(x, _gaussian_less_one) / x.count**2 + _sum_within(y, _gaussian_less_one) / y.count**2
    return _CMMD_SCALE * (within - 2 * _sum_between(x, y, _gaussian_less_one) / (x.count * y.count))


def clip_score(images: npt.ArrayLike, texts: npt.ArrayLike) -> Float64:
    """Return the CLIP score (b,) of each pair, 100 max(cos, 0); a set's score is the mean of its pairs'.

    Hessel et al. (2021) define it with the factor 2.5, torchmetrics with 100. The code of torchmetrics 1.9 clamps the
    mean, and not each pair as its documentation says; both are the same unless a cosine is negative.

    Args:
        images: Embeddings of pictures (b, d).
        texts: Embeddings of their texts (b, d).

    Raises:
        ValueError: Shapes differ, a value is not finite, or an embedding is 0.
    """
    pictures, captions = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (images, texts))
    if pictures.ndim != 2 or pictures.shape != captions.shape:
        raise ValueError(f"embeddings of {tuple(pictures.shape)} pictures and {tuple(captions.shape)} texts do not fit")
    if not (pictures.isfinite().all() and captions.isfinite().all()):
        raise ValueError("embeddings have values that are not finite")
    cosines = (_unit(pictures) * _unit(captions)).sum(1)
    return (100 * cosines.clamp(min=0)).numpy()


_Kernel = Callable[[Tensor, Tensor], Tensor]
"""Kernel matrix (a, b) of blocks (a, d) and (b, d)."""


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    products = torch.addmm(torch.tensor(_KID_COEF0, dtype=x.dtype), x, y.T, alpha=1 / x.shape[1])
    return products.pow_(_KID_DEGREE)


def _gaussian_less_one(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / (2 sigma^2)) - 1 of normalised vectors; ones cancel in the MMD, and digits stay."""
    return torch.expm1((_unit(x) @ _unit(y).T - 1) / _CMMD_SIGMA**2)


def _unit(x: Tensor) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError("an embedding is 0 and has no direction")
    return x / norms


def _sum_within(rows: Rows, kernel: _Kernel) -> float:
    """Return the sum of the kernel over all n^2 pairs; blocks below the diagonal equal those above it."""
    total = 0.0
    for mine, x in rows.blocks():
        for others, y in rows.blocks(mine.start):
            total += (1 if others == mine else 2) * float(kernel(x, y).numpy().sum())
    return total


def _sum_between(ours: Rows, theirs: Rows, kernel: _Kernel) -> float:
    return sum(float(kernel(x, y).numpy().sum()) for _, x in ours.blocks() for _, y in theirs.blocks())


def _sum_cubic_diagonal(rows: Rows) -> float:
    """Return the sum of KID's kernel of each vector with itself."""
    return sum(float(((x * x).mean(1) + _KID_COEF0).pow(_KID_DEGREE).sum()) for _, x in rows.blocks())
