from __future__ import annotations

import functools

import numpy as np

from data_pipelines.common.statistics import ChannelStatistics


def test_merged_parts_equal_the_whole_even_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(1e6, 1.0, (50, 3, 4, 4))
    parts = [ChannelStatistics.of(part, False) for part in np.split(latents, [1, 8, 30])]
    merged = functools.reduce(ChannelStatistics.merge, parts)
    np.testing.assert_allclose(merged.mean, latents.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(merged.std, latents.std(axis=(0, 2, 3)), rtol=1e-9)
    assert merged.count == 50 * 16


def test_moments_give_the_statistics_of_posterior_samples() -> None:
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(2.0, 1.5, (4000, 2, 4, 4)), rng.normal(-1.0, 0.5, (4000, 2, 4, 4))
    statistics = ChannelStatistics.of(np.concatenate([mean, logvar], axis=1), True)
    samples = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape)
    np.testing.assert_allclose(statistics.mean, samples.mean(axis=(0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(statistics.std, samples.std(axis=(0, 2, 3)), rtol=0.02)
