from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomscale.data.interleave import Interleave
from pomscale.data.order import SampleOrder
from pomscale.errors import InputError


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 10**9),
)
def test_every_epoch_is_a_permutation(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = SampleOrder(sizes, seed, window)
    total = sum(sizes)
    positions = epoch * total + np.arange(total)
    records = order.records(positions)
    assert sorted(records.tolist()) == list(range(total))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), window=st.integers(1, 60))
def test_positions_may_be_asked_in_any_order_and_any_company(data: st.DataObject, window: int) -> None:
    sizes = [7, 1, 19, 4]
    whole = SampleOrder(sizes, 5, window).records(np.arange(200))
    positions = data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=30))
    assert SampleOrder(sizes, 5, window).records(np.array(positions)).tolist() == whole[positions].tolist()


def test_epochs_seeds_and_components_differ() -> None:
    order, other = SampleOrder([50, 50], 0, 1000), SampleOrder([50, 50], 1, 1000)
    first, second = order.records(np.arange(100)), order.records(np.arange(100, 200))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.records(np.arange(100)).tolist()
    assert first.tolist() != SampleOrder([50, 50], 0, 1000, component=1).records(np.arange(100)).tolist()


def test_a_window_reads_few_shards_and_a_large_one_mixes_all() -> None:
    sizes = [100] * 50
    windowed = SampleOrder(sizes, 0, 200).records(np.arange(200)) // 100
    assert len(set(windowed.tolist())) == 2
    full = SampleOrder(sizes, 0, 10**9).records(np.arange(200)) // 100
    assert len(set(full.tolist())) > 40


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), window=st.integers(1, 300))
def test_the_shards_of_a_window_are_those_of_its_records(sizes: list[int], window: int) -> None:
    order, total = SampleOrder(sizes, 3, window), sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for position in range(0, 2 * total, max(1, total // 7)):
        epoch, number = order.window_at(position)
        here = [p for p in range(epoch * total, (epoch + 1) * total) if order.window_at(p) == (epoch, number)]
        assert position in here
        shards = order.window_shards(epoch, number)
        assert sorted(shards) == sorted(set(shard_of[order.records(np.array(here))].tolist()))
    last = order.window_at(total - 1)[1]
    assert order.window_shards(0, last + 1) == order.window_shards(1, 0)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InputError, match="no records"):
        SampleOrder([], 0, 10)


def batchmates_met_again(order: SampleOrder, batch: int) -> float:
    """Of all pairs in a batch of one epoch, the share that is in one batch again in the next."""
    total = order.num_records
    batch_of = np.empty((2, total), np.int64)
    for epoch in range(2):
        batch_of[epoch, order.records(epoch * total + np.arange(total))] = np.arange(total) // batch
    together_once = np.bincount(batch_of[0])
    together_twice = np.unique(batch_of[0] * total + batch_of[1], return_counts=True)[1]
    return float((together_twice * (together_twice - 1)).sum() / (together_once * (together_once - 1)).sum())


def test_how_random_a_windowed_shuffle_is() -> None:
    """Against a full shuffle: how far a record moves between epochs, and how often batch-mates meet again.

    128 shards of 128 records, batches of 64 (a full shuffle: displacement 1/3 of the epoch, batch-mates 0.39 %):

        window         128     512   2,048   full
        displacement  0.330   0.330   0.330  0.333
        batch-mates   49.6 %   3.3 %  0.54 %  0.39 %

    The window is 1, 4, 16 and 128 shards. Records travel as far in all of them, for shards are permuted. Batch-mates
    of one shard (a share S/W of them) meet again with chance B/W, others with chance B/N as in a full shuffle:
    S B / W**2 + B / N in all. ImageNet in shards of 4,096 with the default window and batches of 256: 0.044 % for
    0.020 % of a full shuffle.
    """
    shard, total, batch = 128, 128 * 128, 64
    for window in (shard, 4 * shard, 16 * shard, total):
        displacements, mates = [], []
        for seed in range(16):
            order = SampleOrder([shard] * (total // shard), seed, window)
            places = np.empty((2, total))
            for epoch in range(2):
                places[epoch, order.records(epoch * total + np.arange(total))] = np.arange(total)
            displacements.append(np.abs(places[1] - places[0]).mean() / total)
            mates.append(batchmates_met_again(order, batch))
        assert np.mean(displacements) == pytest.approx(1 / 3, abs=0.03)
        assert np.mean(mates) == pytest.approx(shard * batch / window**2 + batch / total, rel=0.15)


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9),
    seed=st.integers(0, 2**32),
    period=st.integers(9, 200),
    start=st.integers(0, 10**12),
)
def test_every_period_gives_each_stream_its_share(weights: list[float], seed: int, period: int, start: int) -> None:
    interleave = Interleave(weights, seed, 0, period)
    share = interleave.places_per_period
    assert share.sum() == period
    assert share.min() >= 1
    places = start * period + np.arange(2 * period)
    streams, indices = interleave.places(places)
    for half in (streams[:period], streams[period:]):
        assert np.bincount(half, minlength=len(weights)).tolist() == share.tolist()
    for stream, count in enumerate(share.tolist()):
        # Each stream is gone through without a gap, from where the periods before left it.
        assert indices[streams == stream].tolist() == list(range(start * count, (start + 2) * count))
    for stop in (0, period // 2, period):
        assert (
            interleave.counts(start * period + stop).tolist()
            == (start * share + np.bincount(streams[:stop], minlength=len(weights))).tolist()
        )


def test_weights_become_the_nearest_whole_numbers() -> None:
    assert Interleave([1, 1, 1], 0, 0, 100).places_per_period.tolist() == [34, 33, 33]
    assert Interleave([0.7, 0.2, 0.1], 0, 0, 10).places_per_period.tolist() == [7, 2, 1]
    assert Interleave([1e-6, 1], 0, 0, 100).places_per_period.tolist() == [1, 99]
    assert Interleave([1] + 9 * [1e-6], 0, 0, 10).places_per_period.tolist() == [1] * 10


def test_a_stream_alone_is_passed_through() -> None:
    places = np.array([5, 0, 10**15])
    streams, indices = Interleave([3.0], 0, 0).places(places)
    assert streams.tolist() == [0, 0, 0]
    assert indices.tolist() == places.tolist()


def test_streams_are_shuffled_anew_in_every_period_and_for_every_purpose() -> None:
    interleave, other = Interleave([1, 1], 0, 0, 64), Interleave([1, 1], 0, 1, 64)
    first, second = interleave.places(np.arange(64))[0], interleave.places(np.arange(64, 128))[0]
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.places(np.arange(64))[0].tolist()
    assert first.tolist() != sorted(first.tolist())
