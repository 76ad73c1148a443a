"""Shift of times by resolution: how much later a sample of more tokens is as noisy as one of fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pomscale.config.model import ImageModelConfig, VideoModelConfig, of_shape
from pomscale.config.train import DiffusionConfig


def time_shift(
    diffusion: DiffusionConfig, model: ImageModelConfig | VideoModelConfig, shape: Sequence[int]
) -> float | None:
    """Return the shift s of the times of samples, the factor on noise over data; None = they are not shifted.

    With n times the tokens, averages over them leave sqrt(n) times less noise, so the same picture is lost at a noise
    over data that is sqrt(n) times larger (Esser et al. 2024, section 5.3.2). The frames of a clip count like its rows.

    Args:
        diffusion: The recipe's section, with the number of tokens at which s is 1.
        model: The network, whose patches make the tokens.
        shape: Latent shape of one sample, (c, h, w) or (c, f, h, w).
    """
    base = diffusion.time.shift_base_tokens
    return None if base is None else math.sqrt(of_shape(model, shape).num_tokens / base)
