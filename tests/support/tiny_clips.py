"""A small V-DiPoM with random weights, and its conditions, for tests of several packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pomscale.base.condition import Text
from pomscale.config.model import VideoModelConfig

TEXT_DIM = 8

V2 = {"kind": "pom", "form": "coefficients", "degree": 3, "heads": 8, "groups": 2, "rope": True}
"""Mixer of the coefficient form with all that it may have, for `video_config`."""


def video_config(**fields: Any) -> VideoModelConfig:
    """3 frame groups of 2 latent frames, 5 x 3 tokens each."""
    changes = {"latent_shape": (3, 6, 10, 6), "text_dim": TEXT_DIM, "dim": 16, "depth": 2, "num_heads": 2, **fields}
    return VideoModelConfig(kind="video", **changes)


def awaken(model: nn.Module, scale: float = 0.2) -> None:
    """Random weights everywhere: a fresh network is the identity and would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale, generator=generator)


def text_of(lengths: list[int], num_tokens: int | None = None, seed: int = 2) -> Text:
    """Captions of these lengths, padded to num_tokens (the longest) with large numbers that nobody may read."""
    shape = (len(lengths), num_tokens or max(lengths), TEXT_DIM)
    embeddings = torch.full(shape, 1e3)
    for row, (caption, length) in enumerate(zip(embeddings, lengths, strict=True)):
        generator = torch.Generator().manual_seed(100 * seed + row)
        caption[:length] = torch.randn(length, TEXT_DIM, generator=generator)
    return Text(embeddings, torch.arange(shape[1]) < torch.tensor(lengths)[:, None])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
