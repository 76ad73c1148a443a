from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pomscale.base.keyed_random import Stream, keyed_generator, keyed_uniforms


@given(
    seed=st.integers(0, 2**63 - 1),
    stream=st.sampled_from(Stream),
    indices=st.lists(st.integers(0, 2**63 - 1), max_size=20),
    subindex=st.integers(0, 2**63 - 1),
)
def test_many_uniforms_at_once_are_those_of_the_generators(
    seed: int, stream: Stream, indices: list[int], subindex: int
) -> None:
    expected = [keyed_generator(seed, stream, index, subindex).random() for index in indices]
    assert keyed_uniforms(seed, stream, np.array(indices, np.int64), subindex).tolist() == expected
