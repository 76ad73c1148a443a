from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from pomscale.data.recycling import Recycler


def test_memory_in_use_is_never_handed_out() -> None:
    recycler = Recycler()
    first = recycler.empty(4, 8)
    place = first.data_ptr()
    view = first[1:, 2].unflatten(0, (1, 3))
    assert recycler.empty(4, 8).data_ptr() != place
    del first
    assert recycler.empty(4, 8).data_ptr() != place  # the view still looks at it
    del view
    assert recycler.empty(4, 8).data_ptr() == place
    assert recycler.empty(8, 4).shape == (8, 4)


def test_threads_get_memory_of_their_own() -> None:
    recycler = Recycler()

    def fill(number: int) -> bool:
        tensors = [recycler.empty(2, 64).fill_(number) for _ in range(4)]
        return all(bool((tensor == number).all()) for tensor in tensors)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fill, range(2000)))


def test_what_is_kept_is_bounded() -> None:
    recycler = Recycler()
    alive = [recycler.empty(1, 8) for _ in range(100)]
    assert len({tensor.data_ptr() for tensor in alive}) == 100
    del alive
    torch.testing.assert_close(recycler.empty(1, 8).zero_(), torch.zeros(1, 8))
