from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np
import pytest

from data_pipelines.shards.statistics import ChannelStatistics, RunningStatistics


def statistics_of(records: np.ndarray, stores_moments: bool = False) -> ChannelStatistics:
    running = RunningStatistics()
    for record in records:
        running.add(record, stores_moments)
    result = running.result()
    assert result is not None
    return result


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 2, 5, 4), (3,)])
def test_records_and_merged_parts_equal_the_whole_even_far_from_zero(shape: tuple[int, ...]) -> None:
    latents = np.random.default_rng(0).normal(1e6, 1.0, (50, *shape))
    parts = (statistics_of(latents[begin:end]) for begin, end in pairwise([0, 1, 8, 30, 50]))
    over = tuple(axis for axis in range(latents.ndim) if axis != 1)
    for found in (functools.reduce(ChannelStatistics.merge, parts), statistics_of(latents)):
        assert found.count == latents.size // 3
        np.testing.assert_allclose(found.mean, latents.mean(axis=over), rtol=1e-14)
        np.testing.assert_allclose(found.std, latents.std(axis=over), rtol=1e-9)


def test_records_of_different_shapes_count_by_their_values() -> None:
    rng = np.random.default_rng(1)
    wide, tall = rng.normal(3.0, 1.0, (2, 4, 8)), rng.normal(-2.0, 2.0, (2, 6, 3))
    running = RunningStatistics()
    running.add(wide, False)
    running.add(tall, False)
    whole = np.concatenate([wide.reshape(2, -1), tall.reshape(2, -1)], axis=1)
    found = running.result()
    assert found is not None
    np.testing.assert_allclose(found.mean, whole.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(found.std, whole.std(axis=1), rtol=1e-14)


def test_moments_give_the_statistics_of_posterior_samples() -> None:
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(2.0, 1.5, (4000, 2, 4, 4)), rng.normal(-1.0, 0.5, (4000, 2, 4, 4))
    statistics = statistics_of(np.concatenate([mean, logvar], axis=1), stores_moments=True)
    samples = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape)
    np.testing.assert_allclose(statistics.mean, samples.mean(axis=(0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(statistics.std, samples.std(axis=(0, 2, 3)), rtol=0.02)
    assert statistics.count == 4000 * 16


def test_nothing_added_is_no_result() -> None:
    assert RunningStatistics().result() is None
