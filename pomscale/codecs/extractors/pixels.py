"""The extractor without a network: pixels as features, for small pictures, tests and a reader's own check."""

from __future__ import annotations

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, weights_identity

_LARGEST = 32  # 3,072 features in colour; a covariance of more would take longer than a network


class Pixels:
    """Values in [0, 1] of grey or colour pictures, flattened in the order channel, row, column."""

    name = "pixels"
    num_channels = None
    takes_clips = False
    identity = weights_identity("pixels 1", {})

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.dims: dict[FeatureName, int | None] = {"pooled": None}

    def check_size(self, *size: int) -> None:
        if max(size) > _LARGEST:
            raise InputError(
                f"extractor pixels: it takes pictures up to {_LARGEST}x{_LARGEST}, and these are "
                f"{'x'.join(map(str, size))}; choose another extractor"
            )

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        return {"pooled": media.to(self.device, torch.float32).flatten(1) / 255.0}

    def to(self, device: torch.device | str) -> Pixels:
        self.device = torch.device(device)
        return self
