"""A tiny network of pictures with random weights."""

from __future__ import annotations

import torch

from pomscale.config.model import ImageModelConfig
from pomscale.models import DiPoM
from support.gaussian import SHAPE


def dipom(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> DiPoM:
    """5 classes, pictures of `SHAPE`."""
    model = DiPoM(ImageModelConfig(latent_shape=SHAPE, num_classes=5, dim=16, depth=2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2, generator=generator)
    return model.to(dtype).requires_grad_(False)
