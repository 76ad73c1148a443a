"""A hash of a set of pictures that does not depend on the parts in which it was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pomscale.evaluation.generated.picture_sets import Batch

NOTHING = "0" * 64
"""The hash (hex) of no pictures."""


def add_hashes(hashes: Iterable[str]) -> str:
    """Return the hash (hex) of the pictures of several disjoint sets: the sum of theirs, modulo 2^256."""
    return f"{sum(int(one, 16) for one in hashes) % 2**256:064x}"


def hash_of(batch: Batch) -> str:
    """Return the hash (hex) of the pictures of a batch: the sum of sha256(number, bytes with channels first)."""
    pixels = batch.pixels.numpy()
    return add_hashes(
        hashlib.sha256(number.to_bytes(8, "little") + one.tobytes()).hexdigest()
        for number, one in zip(batch.numbers, pixels, strict=True)
    )
