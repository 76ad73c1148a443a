"""The extractor and teacher of the demo: a small network fitted on real handwritten digits.

Its weights lie in the package. `python -m data_pipelines.demos.digits_network` fitted it on the held-out half of the
digits (data_pipelines/demos/digits.py), so that the training half, and what is generated from it, are new to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, silu

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, inference, weights_identity

WEIGHTS = Path(__file__).with_name("digits.safetensors")
SIZE = 8
_NUM_CLASSES = 10
_NUM_FEATURES = 64


class DigitsNetwork(nn.Module):
    """Network from grey pictures (b, 1, 8, 8) in [0, 1] to features (b, 64) and class scores (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third = nn.Conv2d(32, _NUM_FEATURES, 3, padding=1)
        self.classes = nn.Linear(_NUM_FEATURES, _NUM_CLASSES)

    def map(self, x: Tensor) -> Tensor:
        """Return the map (b, 64, 4, 4) before pooling."""
        return silu(self.third(max_pool2d(silu(self.second(silu(self.first(x)))), 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.map(x).mean((2, 3))
        return pooled, self.classes(pooled)


class Digits:
    """Extractor and teacher of grey pictures of 8x8, ink bright, as scikit-learn's digits are."""

    name = "digits"
    num_channels: Literal[1] = 1
    takes_clips = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.dims: dict[FeatureName, int | None] = {"pooled": _NUM_FEATURES, "logits": _NUM_CLASSES}
        weights = load_file(WEIGHTS)
        self.identity = weights_identity("digits 1", weights)
        self._network = DigitsNetwork().requires_grad_(False).eval()
        self._network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})

    def check_size(self, *size: int) -> None:
        if size != (SIZE, SIZE):
            raise InputError(
                f"extractor digits: it takes pictures of {SIZE}x{SIZE}, as the demo's digits are, and these are "
                f"{'x'.join(map(str, size))}; choose another extractor"
            )

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        with inference(self.device):
            pooled, logits = self._network(media.to(self.device, torch.float32) / 255.0)
        found: dict[FeatureName, Tensor] = {"pooled": pooled, "logits": logits}
        return {name: found[name] for name in names}

    def map_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self.check_size(height, width)
        return _NUM_FEATURES, SIZE // 2, SIZE // 2

    def feature_map(self, pictures: Tensor) -> Tensor:
        check_media(self, pictures, ())
        with inference(self.device):
            return self._network.map(pictures.to(self.device, torch.float32) / 255.0)

    def to(self, device: torch.device | str) -> Digits:
        self.device = torch.device(device)
        self._network.to(self.device)
        return self
