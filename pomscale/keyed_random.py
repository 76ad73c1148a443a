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
    MIXTURE = 10


def keyed_generator(seed: int, stream: Stream, index: int, subindex: int = 0) -> np.random.Generator:
    """A generator for one purpose: same arguments, same numbers, on any machine and any rank.

    seed and index key the generator; stream and subindex choose disjoint parts of its counter space.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, subindex, int(stream)]))


def keyed_uniforms(seed: int, stream: Stream, indices: np.ndarray, subindex: int = 0) -> np.ndarray:
    """The first uniform number in [0, 1) of many generators at once: int (b,) -> float64 (b,).

    Value i equals `keyed_generator(seed, stream, indices[i], subindex).random()` to the last bit, for a fiftieth of
    the time where there are many.
    """
    ones = np.ones(len(indices), np.uint64)
    # NumPy counts on before it draws its first block, hence the 1.
    counter = (ones, 0 * ones, subindex * ones, int(stream) * ones)
    block = _philox_4x64_10(counter, (seed * ones, np.asarray(indices).astype(np.uint64)))
    return (block[0] >> np.uint64(11)) * 2.0**-53


_Block = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# Salmon et al. 2011, table 2 (multipliers) and section 4.3 (Weyl constants of the key schedule).
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_LOW_HALF, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _philox_4x64_10(counter: _Block, key: tuple[np.ndarray, np.ndarray]) -> _Block:
    """Philox4x64 with 10 rounds, for many counters and keys at once. All arrays (b,) uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(_MULTIPLIERS[0], c0), _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def _multiply(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of the 128-bit products a * b: by 32-bit halves, for NumPy has no wider integer."""
    a_high, a_low = np.uint64(a >> 32), np.uint64(a & 0xFFFFFFFF)
    b_high, b_low = b >> _HALF, b & _LOW_HALF
    middle = a_high * b_low + (a_low * b_low >> _HALF)  # at most 2**64 - 2**32
    carry = a_low * b_high + (middle & _LOW_HALF)
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), np.uint64(a) * b
