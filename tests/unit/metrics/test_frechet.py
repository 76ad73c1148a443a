"""The Frechet distance against its definition, by matrix roots and by closed forms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import linalg

from pomscale.metrics.frechet import frechet_distance
from pomscale.metrics.moments import Gaussian, Moments
from support.outside_metrics import few_sets, pooled_features

Float64 = npt.NDArray[np.float64]


def gaussian(features: npt.NDArray[np.floating]) -> Gaussian:
    wide = features.astype(np.float64)
    return Gaussian(wide.mean(0), np.cov(wide, rowvar=False), len(wide))


def by_matrix_root(one: Gaussian, two: Gaussian) -> float:
    difference = one.mean - two.mean
    root = linalg.sqrtm(one.covariance @ two.covariance)
    return float(difference @ difference + np.trace(one.covariance + two.covariance - 2 * root.real))


def random_covariance(random: np.random.Generator, width: int, rank: int) -> Float64:
    factor = random.standard_normal((width, rank)) * np.exp(random.standard_normal(rank))
    return factor @ factor.T


@pytest.mark.parametrize("width", [1, 7, 64])
def test_equals_the_matrix_root_where_both_covariances_are_regular(width: int) -> None:
    random = np.random.default_rng(width)
    one, two = (
        Gaussian(random.standard_normal(width), random_covariance(random, width, 3 * width), 1000) for _ in range(2)
    )
    found = frechet_distance(one, two)
    assert found.value == pytest.approx(by_matrix_root(one, two), rel=1e-9)
    assert found.value == found.mean_term + found.covariance_term
    assert found.ranks == (width, width)
    assert not found.warnings


def test_moments_of_batches_and_of_parts_give_what_all_features_give() -> None:
    generated, real = pooled_features(301, 24, seed=1, shift=0.3), pooled_features(205, 24, seed=2)
    sums = []
    for features in (generated, real):
        parts = [Moments.empty(24), Moments.empty(24)]
        for part, half in zip(parts, (features[:100], features[100:]), strict=True):
            for begin in range(0, len(half), 7):
                part.add(half[begin : begin + 7])
        parts[0].merge(parts[1])
        sums.append(parts[0])
    assert frechet_distance(*sums).value == pytest.approx(by_matrix_root(gaussian(generated), gaussian(real)), rel=1e-9)


def test_commuting_singular_covariances_have_their_closed_form() -> None:
    """Matrix roots fail here: C1 C2 has a null space, on which its root does not exist or is complex."""
    random = np.random.default_rng(0)
    basis = linalg.qr(random.standard_normal((60, 60)))[0]
    one, two = (random.random(60) ** 4 + 1e-9 for _ in range(2))
    one[:20], two[10:35] = 0, 0
    pair = [Gaussian(np.zeros(60), (basis * values) @ basis.T) for values in (one, two)]
    found = frechet_distance(*pair)
    assert found.value == pytest.approx(((np.sqrt(one) - np.sqrt(two)) ** 2).sum(), rel=1e-9)
    assert found.ranks == (40, 35)
    assert found.warnings == (
        "generated: the covariance is singular, of rank 40 for 60 features",
        "real: the covariance is singular, of rank 35 for 60 features",
    )


def test_fewer_samples_than_features_are_right_and_said() -> None:
    """With C = X^T X, the root's trace is the sum of the singular values of X1 X2^T, a small matrix of samples."""
    generated, real = (features.astype(np.float64) for features in few_sets())
    roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (generated, real)]
    difference = generated.mean(0) - real.mean(0)
    expected = difference @ difference + sum((root**2).sum() for root in roots)
    expected -= 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    found = frechet_distance(gaussian(generated), gaussian(real))
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.ranks == (49, 256)
    assert found.warnings == (
        "generated: 50 samples for 256 features: their covariance has rank 49, and the Frechet distance is biased "
        "upwards; compare it only with values from as many samples",
    )


def test_equal_sets_have_distance_zero_to_many_digits() -> None:
    one = gaussian(few_sets()[0])
    assert frechet_distance(one, one).value < 1e-11 * np.trace(one.covariance)


def test_constant_features_are_no_trouble() -> None:
    flat, wide = Gaussian(np.ones(3), np.zeros((3, 3)), 9), Gaussian(np.zeros(3), np.eye(3), 9)
    assert frechet_distance(flat, wide).value == pytest.approx(6)
    assert frechet_distance(flat, flat).value == 0


def test_covariances_that_were_stored_in_float32_are_taken() -> None:
    generated, real = (gaussian(features) for features in few_sets())
    rounded = [Gaussian(g.mean, g.covariance.astype(np.float32), g.count) for g in (generated, real)]
    assert frechet_distance(*rounded).value == pytest.approx(frechet_distance(generated, real).value, rel=1e-4)


def test_another_width_is_refused() -> None:
    pair = [Gaussian(np.zeros(d), np.eye(d)) for d in (2, 3)]
    with pytest.raises(ValueError, match="have width 2, real ones 3: they are not from the same extractor"):
        frechet_distance(*pair)


def test_a_matrix_with_negative_eigenvalues_is_no_covariance() -> None:
    pair = Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(2), np.diag([1.0, -0.5]))
    with pytest.raises(ValueError, match=r"real: the covariance is none: its eigenvalues go from -0\.5 to 1"):
        frechet_distance(*pair)
