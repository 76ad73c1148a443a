from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomscale.data.interleave import PERIOD, Interleave
from pomscale.data.order import SampleOrder


@settings(max_examples=100)
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


@settings(max_examples=50)
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


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), window=st.integers(1, 300))
def test_the_shards_of_a_window_are_those_of_its_records(sizes: list[int], window: int) -> None:
    order, total = SampleOrder(sizes, 3, window), sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    windows = [order.window_at(position) for position in range(2 * total)]
    assert windows == sorted(windows)
    for number in range(windows[-1] + 1):
        here = [position for position, window in enumerate(windows) if window == number]
        assert 1 <= len(here) <= window
        assert sorted(order.window_shards(number)) == sorted(set(shard_of[order.records(np.array(here))].tolist()))


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


def exact_counts(weights: list[Fraction], num_places: int) -> list[Fraction]:
    return [weight / sum(weights) * num_places for weight in weights]


@settings(max_examples=100)
@given(
    weights=st.lists(st.fractions(Fraction(1, 10**9), 10**9), min_size=2, max_size=9),
    seed=st.integers(0, 2**32),
    period=st.integers(1, 200),
    first=st.integers(0, 10**12),
    length=st.integers(1, 500),
)
def test_every_prefix_gives_each_stream_its_share(
    weights: list[Fraction], seed: int, period: int, first: int, length: int
) -> None:
    interleave = Interleave(weights, seed, 0, period)
    streams, indices = interleave.locate(np.arange(first, first + length))
    before = interleave.counts(first).tolist()
    assert sum(before) == first
    for stream in range(len(weights)):
        # Each stream is gone through without a gap, from where the places before left it.
        here = indices[streams == stream].tolist()
        assert here == list(range(before[stream], before[stream] + len(here)))
    # Nothing adds up over the periods. Two is for rounding (where the period begins, and how many places it has);
    # that all streams are rounded down makes a period begin early, by up to a place for each.
    shares = [float(weight / sum(weights)) for weight in weights]
    for stop in {0, length // 2, length}:
        counts = interleave.counts(first + stop).tolist()
        assert counts == (before + np.bincount(streams[:stop], minlength=len(weights))).tolist()
        for count, exact, share in zip(counts, exact_counts(weights, first + stop), shares, strict=True):
            assert abs(count - exact) <= 2 + 2 * len(weights) * share


@pytest.mark.parametrize("weights", [[98_000_000, 10], [1, 1], [7, 2, 1], [Fraction(0.1), Fraction(0.3)]])
def test_shares_are_never_rounded(weights: list[Fraction | int]) -> None:
    interleave = Interleave(weights, seed=0, subindex=0)
    for num_periods in (1, 2, 150, 10**9):
        num_places = num_periods * PERIOD
        for count, exact in zip(interleave.counts(num_places), exact_counts(weights, num_places), strict=True):
            assert abs(count - exact) <= 2


def test_two_equal_streams_take_turns_in_pairs() -> None:
    streams, _ = Interleave([5, 5], 0, 0, 64).locate(np.arange(640))
    assert np.abs(np.cumsum(2 * streams - 1)).max() == 1
    assert 200 < np.count_nonzero(np.diff(streams)) < 600  # at random, not A B A B


def test_a_stream_alone_is_passed_through() -> None:
    places = np.array([5, 0, 10**15])
    streams, indices = Interleave([3], 0, 0).locate(places)
    assert streams.tolist() == [0, 0, 0]
    assert indices.tolist() == places.tolist()


@settings(max_examples=50)
@given(data=st.data(), period=st.integers(1, 30))
def test_places_may_be_asked_in_any_order_and_any_company(data: st.DataObject, period: int) -> None:
    weights = [1, 5, 2]
    whole = Interleave(weights, 5, 0, period).locate(np.arange(100))
    some = np.array(data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=30)))
    found = Interleave(weights, 5, 0, period).locate(some)
    assert [part.tolist() for part in found] == [part[some].tolist() for part in whole]


def test_streams_are_shuffled_again_in_every_period_and_for_every_purpose() -> None:
    interleave, other = Interleave([1, 1], 0, 0, 64), Interleave([1, 1], 0, 1, 64)
    first, second = interleave.locate(np.arange(64))[0], interleave.locate(np.arange(64, 128))[0]
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.locate(np.arange(64))[0].tolist()
