"""Random numbers that depend on their purpose, never on the process that draws them.

Every draw is keyed by (seed, stream, index): the index is a sample's global position, so noise, time,
condition dropout, flips and shuffles are the same on 1 rank or 64, in any order, after any resume.
The generator is NumPy's Philox (Salmon et al. 2011), counter based: making one costs microseconds and two
different keys never overlap.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of draws. The numbers are part of the reproducibility contract: append, never renumber."""

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
    MIXTURE = 10
    START_GROUP = 11
    CAPTION = 12
    SAMPLING_STEP_NOISE = 13
    SAMPLE_LABEL = 14
    RECALL = 15
    DROPOUT = 16


def keyed_generator(seed: int, stream: Stream, index: int, subindex: int = 0) -> np.random.Generator:
    """Return a generator for one purpose: same arguments, same numbers, on any machine and any rank.

    seed and index key the generator; stream and subindex choose disjoint parts of its counter space.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, subindex, int(stream)]))


def keyed_uniforms(seed: int, stream: Stream, indices: np.ndarray, subindex: int = 0) -> np.ndarray:
    """Return the first uniform number in [0, 1) of many generators at once: int (b,) -> float64 (b,).

    Value i equals `keyed_generator(seed, stream, indices[i], subindex).random()` to the last bit, for a fiftieth of
    the time where there are many.
    """
    # NumPy counts on before it draws its first block, hence the 1.
    first = _philox_4x64_10((1, 0, subindex, int(stream)), seed, np.asarray(indices).astype(np.uint64))
    return (first >> np.uint64(11)) * 2.0**-53


# Salmon et al. 2011, table 2 (multipliers) and section 4.3 (Weyl constants of the key schedule).
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
_LOW_HALF, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _philox_4x64_10(counter: tuple[int, int, int, int], seed: int, indices: np.ndarray) -> np.ndarray:
    """Return the first word of a 10-round Philox4x64 block for many keys (seed, index): uint64 (b,) -> (b,)."""
    c0, c1, c2, c3 = counter
    key = np.stack([np.full_like(indices, seed), indices])
    even, odd = (np.repeat(np.array(words, np.uint64)[:, None], len(indices), 1) for words in ([c0, c2], [c1, c3]))
    for _ in range(10):
        high, low = _multiply(_MULTIPLIERS, even)
        even, odd = high[::-1] ^ odd ^ key, low[::-1]
        key = key + _WEYL
    return even[0]


def _multiply(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return high and low 64 bits of the 128-bit products a * b, from 32-bit halves: NumPy has no wider integer."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW_HALF, b >> _HALF, b & _LOW_HALF
    middle = a_high * b_low + (a_low * b_low >> _HALF)  # at most 2**64 - 2**32
    carry = a_low * b_high + (middle & _LOW_HALF)
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), a * b
