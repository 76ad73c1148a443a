from __future__ import annotations

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pomscale.shards.checksums import wrong_rows


@given(num_rows=st.integers(0, 100), num_bytes=st.integers(1, 300), data=st.data())
def test_exactly_the_damaged_rows_are_found(num_rows: int, num_bytes: int, data: st.DataObject) -> None:
    content = np.random.default_rng(num_rows * num_bytes).integers(0, 256, (num_rows, num_bytes), np.uint8)
    crc32s = np.array([zlib.crc32(row) for row in content], np.uint32)
    assert wrong_rows(content, crc32s) == []
    damaged = data.draw(st.sets(st.integers(0, num_rows - 1)) if num_rows else st.just(set()))
    for row in damaged:
        content[row, data.draw(st.integers(0, num_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert wrong_rows(content, crc32s) == sorted(damaged)
