"""Random numbers that depend on what they are for, never on who draws them.

Every draw is keyed by (seed, stream, index): the index is a sample's global position, so noise, time,
condition dropout, flips and shuffles are the same on 1 rank or 64, in any order, after any resume.
The generator is NumPy's Philox (Salmon et al. 2011), counter based: making one costs microseconds and two
different keys never overlap.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for. Numbers are part of the reproducibility contract: append, never renumber."""

    NOISE = 0
    TIME = 1
    CONDITION_DROPOUT = 2
    FLIP = 3
    POSTERIOR = 4
    SHARD_ORDER = 5
    WINDOW_ORDER = 6
    SAMPLING_NOISE = 7
    VALIDATION_NOISE = 8
    DATASET = 9


def keyed_generator(seed: int, stream: Stream, index: int, subindex: int = 0) -> np.random.Generator:
    """A generator for one purpose: same arguments, same numbers, on any machine and any rank.

    seed and index key the generator; stream and subindex choose disjoint parts of its counter space.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, subindex, int(stream)]))
