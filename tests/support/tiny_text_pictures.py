"""A small network of pictures of a text, in both ways in which a text comes in, for tests of several packages."""

from __future__ import annotations

from typing import Any

from pomscale.config.model import ImageModelConfig
from support.tiny_clips import TEXT_DIM

WAYS: dict[str, dict[str, Any]] = {
    "cross": {"text": "cross"},
    "in context": {"text": "in_context"},
    "in context, later": {"text": "in_context", "text_start": 1},
}
"""Ways in which a text comes in."""


def text_config(**fields: Any) -> ImageModelConfig:
    """5 x 3 tokens."""
    changes = {"latent_shape": (3, 10, 6), "text_dim": TEXT_DIM, "dim": 16, "depth": 2, "num_heads": 2, **fields}
    return ImageModelConfig.model_validate(changes)
