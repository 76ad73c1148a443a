"""Moments against numpy, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from pomscale.metrics.moments import Gaussian, Moments


def test_moments_are_numpys() -> None:
    features = np.random.default_rng(0).standard_normal((53, 5)) + 3
    moments = Moments.empty(5)
    for begin in range(0, 53, 8):
        moments.add(features[begin : begin + 8].astype(np.float32))
    single = features.astype(np.float32).astype(np.float64)
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, single.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(single, rowvar=False), rtol=1e-12)
    assert found.count == 53


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(value: float) -> None:
    moments = Moments.empty(2)
    with pytest.raises(ValueError, match="not finite"):
        moments.add(np.array([[1.0, 2.0], [3.0, value]]))
    assert moments.count == 0
    assert not moments.outer.any()


def test_other_widths_are_refused() -> None:
    moments = Moments.empty(2)
    with pytest.raises(ValueError, match=r"\(4, 3\) do not fit moments of 2 features"):
        moments.add(np.ones((4, 3)))
    with pytest.raises(ValueError, match="moments of 3 features do not fit those of 2"):
        moments.merge(Moments.empty(3))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_covariance(count: int) -> None:
    moments = Moments.empty(2)
    moments.add(np.ones((count, 2)))
    with pytest.raises(ValueError, match=f"at least 2 samples, and there are {count}"):
        moments.gaussian()


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (np.zeros(2), np.eye(3), None, "do not fit"),
        (np.zeros((1, 2)), np.eye(2), None, "do not fit"),
        (np.zeros(0), np.zeros((0, 0)), None, "do not fit"),
        (np.zeros(2), np.array([[1.0, np.nan], [0.0, 1.0]]), None, "not finite"),
        (np.array([0, np.inf]), np.eye(2), None, "not finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.4, 1.0]]), None, "not symmetric: entries differ by 0.1"),
        (np.zeros(2), np.eye(2, dtype=np.int64), None, "one is int64"),
        (np.zeros(2), np.eye(2), 1, "there are 1"),
    ],
)
def test_what_is_no_gaussian_is_refused(
    mean: np.ndarray, covariance: np.ndarray, count: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian(mean, covariance, count)
