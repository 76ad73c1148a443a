from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.encode import item_order
from data_pipelines.encode.item_order import ItemOrder
from pomscale.shards.index import key_hash

FIRST_FILES = [51, 399, 298, 707, 12]


@settings(max_examples=200)
@given(num_items=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_every_item_is_dealt_once(num_items: int, seed: int) -> None:
    order = ItemOrder(num_items, seed, shuffled=True)
    assert sorted(map(order.item, range(num_items))) == list(range(num_items))


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 16, 17, 24, 25, 26, 65536, 65537])
def test_every_item_is_dealt_once_at_the_edges_of_squares(num_items: int) -> None:
    order = ItemOrder(num_items, 0, shuffled=True)
    assert {order.item(position) for position in range(num_items)} == set(range(num_items))


def test_seeds_differ_and_repeat() -> None:
    orders = [[ItemOrder(1000, seed, True).item(position) for position in range(1000)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    equal = sum(a == b for a, b in zip(orders[0], orders[2], strict=True))
    assert equal < 10  # 1 is expected of two random orders


def test_the_order_is_part_of_the_format() -> None:
    """A resumed encode must deal as the one that was stopped, also with a later version of this code."""
    order = ItemOrder(1_281_167, 0, shuffled=True)
    assert [order.item(position) for position in range(5)] == [16955, 297712, 575987, 674050, 823924]


def test_places_far_out_need_no_list() -> None:
    order = ItemOrder(10**15, 3, shuffled=True)
    found = {order.item(position) for position in range(10**15 - 100, 10**15)}
    assert len(found) == 100
    assert all(0 <= item < 10**15 for item in found)


def test_without_shuffling_it_is_the_order_of_the_source() -> None:
    order = ItemOrder(10, 5, shuffled=False)
    assert [order.item(position) for position in range(10)] == list(range(10))


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("position", [-1, 10])
def test_places_outside_are_refused(shuffled: bool, position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position} of 10"):
        ItemOrder(10, 0, shuffled).item(position)


@pytest.mark.parametrize("num_items", [40_960, 100_000])
def test_a_sorted_class_folder_is_dealt_as_evenly_as_by_a_full_shuffle(num_items: int) -> None:
    """Chi-square of 20 classes over blocks of 4096, and of consecutive pairs: no larger than chance makes it."""
    order = ItemOrder(num_items, 1, shuffled=True)
    classes = np.array([order.item(position) for position in range(num_items)]) * 20 // num_items
    for begin in range(0, num_items - 4095, 4096):
        counts = np.bincount(classes[begin : begin + 4096], minlength=20)
        expected = 4096 / 20
        assert ((counts - expected) ** 2 / expected).sum() < 19 + 6 * np.sqrt(2 * 19)
    pairs = np.bincount(classes[:-1] * 20 + classes[1:], minlength=400)
    expected = (num_items - 1) / 400
    assert ((pairs - expected) ** 2 / expected).sum() < 399 + 6 * np.sqrt(2 * 399)


@settings(max_examples=100)
@given(
    files=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    seed=st.integers(0, 2**63 - 1),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_items_of_a_file_are_neighbours_by_their_starts(
    files: list[int], seed: int, block: int, data: st.DataObject
) -> None:
    starts = data.draw(st.lists(st.integers(-1, 5), min_size=len(files), max_size=len(files)))
    hashes = np.array([key_hash(str(file)) for file in files], "<u8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_order, "BLOCK", block)
        dealt = np.concatenate(list(item_order.file_by_file(hashes, np.array(starts, "<i8"), seed))).tolist()
    assert sorted(dealt) == list(range(len(files)))
    runs = [file for i, file in enumerate(files[item] for item in dealt) if i == 0 or files[dealt[i - 1]] != file]
    assert len(runs) == len(set(files))
    for one, other in pairwise(dealt):
        if files[one] == files[other]:
            assert (starts[one], one) < (starts[other], other)


def test_files_are_in_an_order_of_the_seed() -> None:
    def dealt(seed: int) -> list[int]:
        hashes = np.array([key_hash(str(file)) for file in range(1000)], "<u8")
        return np.concatenate(list(item_order.file_by_file(hashes, np.zeros(1000, "<i8"), seed))).tolist()

    assert dealt(0) == dealt(0)
    assert sum(a == b for a, b in zip(dealt(0), dealt(1), strict=True)) < 10
    assert dealt(0)[:5] == FIRST_FILES  # part of the format, as the order of items
