"""The Frechet distance between Gaussians: FID, sFID, FDD and FVD, which differ in their features alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pomscale.metrics.moments import Float64, Gaussian, Moments

_LARGEST_NOISE = 1e-4  # a covariance in float32 has eigenvalues down to about -1e-7 of the largest


@dataclass(frozen=True)
class Frechet:
    """A squared Frechet distance, its terms, and what is to be known about the covariances.

    Attributes:
        value: |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), at least 0.
        mean_term: |mu_1 - mu_2|^2.
        covariance_term: The rest of `value`.
        ranks: Numerical ranks of C_1 and C_2.
        warnings: A sentence for each set whose covariance is singular; empty if none is.
    """

    value: float
    mean_term: float
    covariance_term: float
    ranks: tuple[int, int]
    warnings: tuple[str, ...] = field(default=())


def frechet_distance(generated: Moments | Gaussian, real: Moments | Gaussian) -> Frechet:
    """Return the squared Frechet distance of two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017, eq. 6).

    With factors C_i = F_i F_i^T from eigenvectors, the eigenvalues of the symmetric product F_1^T C_2 F_1 = M^T M,
    where M = F_2^T F_1, are those of C_1 C_2. The trace of the root is the sum of their square roots, which are
    the singular values of M. They are taken from M itself, since squaring it would lose half of the digits of the
    small ones. No matrix square root is needed, nothing becomes complex, and singular covariances need no offset.

    Raises:
        ValueError: The widths differ, or a covariance has a clearly negative eigenvalue.
    """
    one = generated.gaussian() if isinstance(generated, Moments) else generated
    two = real.gaussian() if isinstance(real, Moments) else real
    if one.width != two.width:
        raise ValueError(
            f"generated features have width {one.width}, real ones {two.width}: they are not from the same extractor"
        )
    factors = [_factor(gaussian.covariance, name) for gaussian, name in ((one, "generated"), (two, "real"))]
    root_trace = float(np.linalg.svd(factors[1].T @ factors[0], compute_uv=False).sum())
    difference = one.mean - two.mean
    mean_term = float(difference @ difference)
    traces = float(np.trace(one.covariance) + np.trace(two.covariance))
    covariance_term = max(traces - 2 * root_trace, 0.0)
    ranks = factors[0].shape[1], factors[1].shape[1]
    warnings = [_describe(one, ranks[0], "generated"), _describe(two, ranks[1], "real")]
    return Frechet(
        mean_term + covariance_term, mean_term, covariance_term, ranks, tuple(text for text in warnings if text)
    )


def _factor(covariance: Float64, name: str) -> Float64:
    """Return F (d, r) with F F^T = C, where r is C's numerical rank.

    Eigenvalues up to that of rounding are dropped: d eps times the largest, or the size of the most negative one,
    which tells how exactly C was stored.
    """
    values, vectors = np.linalg.eigh(covariance)
    smallest, largest = float(values[0]), float(values[-1])
    if smallest < -_LARGEST_NOISE * max(largest, 0.0):
        raise ValueError(
            f"{name}: the covariance is none: its eigenvalues go from {smallest:.3g} to {largest:.3g}, "
            "and none may be negative"
        )
    noise = max(len(values) * np.finfo(np.float64).eps * largest, -smallest)
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])


def _describe(gaussian: Gaussian, rank: int, name: str) -> str | None:
    """Return what a reader must know of a singular covariance, or None."""
    width, count = gaussian.width, gaussian.count
    if count is not None and count <= width:
        return (
            f"{name}: {count} samples for {width} features: their covariance has rank {rank}, and the Frechet "
            "distance is biased upwards; compare it only with values from as many samples"
        )
    if rank < width:
        return f"{name}: the covariance is singular, of rank {rank} for {width} features"
    return None
