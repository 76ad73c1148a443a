"""Embeddings of one caption by several encoders, as a network sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return embeddings (n_i, dim_i) of one caption by several encoders as one array (sum of n_i, largest dim_i).

    The narrower ones are padded with zeros on channels, and the sequences concatenated along tokens, as
    `StableDiffusion3Pipeline.encode_prompt` of diffusers does.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
