"""Uniform numbers that choose between the stored forms of a sample: its flipped copy, one of its captions."""

from __future__ import annotations

import functools

import numpy as np

from pomscale.base.keyed_random import Stream, keyed_uniforms
from pomscale.data.order import groups

# Positions that are drawn for at once: a micro-batch alone is too short for a vectorised draw.
_AT_ONCE = 8192


def uniforms_at(positions: np.ndarray, seed: int, stream: Stream) -> np.ndarray:
    """Return a uniform number in [0, 1) for each global position (b,), float64, keyed by (seed, stream, position)."""
    blocks, offsets = np.divmod(positions, _AT_ONCE)
    uniforms = np.empty(len(positions))
    for block, here in groups(blocks):
        uniforms[here] = _block(seed, stream, block)[offsets[here]]
    return uniforms


@functools.lru_cache(maxsize=16)
def _block(seed: int, stream: Stream, block: int) -> np.ndarray:
    return keyed_uniforms(seed, stream, np.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE))
