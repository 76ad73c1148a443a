from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_epochs_and_seeds_differ() -> None:
    order, other = SampleOrder([50, 50], 0, 1000), SampleOrder([50, 50], 1, 1000)
    first, second = order.records(np.arange(100)), order.records(np.arange(100, 200))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.records(np.arange(100)).tolist()


def test_a_window_reads_few_shards_and_a_large_one_mixes_all() -> None:
    sizes = [100] * 50
    windowed = SampleOrder(sizes, 0, 200).records(np.arange(200)) // 100
    assert len(set(windowed.tolist())) == 2
    full = SampleOrder(sizes, 0, 10**9).records(np.arange(200)) // 100
    assert len(set(full.tolist())) > 40


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InputError, match="no records"):
        SampleOrder([], 0, 10)
