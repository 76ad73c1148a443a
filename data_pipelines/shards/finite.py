"""Find values that cannot be stored as float16, and say what they are."""

from __future__ import annotations

import numpy as np


def is_finite(values: np.ndarray) -> bool:
    """Return whether all float16 values are finite, as those of uint8 always are.

    Infinities and NaN have all bits of the exponent set; np.isfinite takes ten times as long to see it.
    """
    return values.dtype == np.uint8 or not values.size or int((values.view("<u2") & 0x7FFF).max()) < 0x7C00


def why_not_finite(values: np.ndarray) -> str:
    """Return, as part of a sentence, which of an array's float16 values are not finite, and what causes such values."""
    num_nan, num_infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    finite = values[np.isfinite(values)]
    others = f"the others lie between {finite.min():g} and {finite.max():g}" if finite.size else "there are no others"
    if num_nan:
        also = f" and {num_infinite:,} infinite" if num_infinite else ""
        return (
            f"{num_nan:,} of {values.size:,} values that are NaN{also} ({others}): the network itself fails on it; "
            f"check its weights, and try precision: fp32"
        )
    return (
        f"{num_infinite:,} of {values.size:,} values beyond 65,504, the largest of float16 ({others}): the network "
        f"gives numbers that are too large to be stored"
    )
