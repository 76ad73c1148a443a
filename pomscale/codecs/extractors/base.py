"""The interface of feature extractors: networks that turn pictures or clips into features that metrics compare."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

FeatureName: TypeAlias = Literal["pooled", "spatial", "logits"]
"""pooled (b, d): one vector per picture or clip; spatial (b, s): a flattened map before pooling, for sFID; logits
(b, k): unnormalised class scores, for the inception score."""


class Extractor(Protocol):
    """A frozen network with all that comes before it: resizing and normalisation are part of the extractor.

    Results do not depend on the batch, up to the rounding of sums.
    """

    @property
    def name(self) -> str:
        """Name as it is asked for, without the path: "inception", "dinov2" ..."""

    @property
    def identity(self) -> str:
        """sha256 (hex) of network, weights and preprocessing: extractors of equal identity give equal features."""

    @property
    def num_channels(self) -> Literal[1, 3]:
        """Channels of the pictures that it takes."""

    @property
    def takes_clips(self) -> bool:
        """Whether it takes clips, and not pictures."""

    @property
    def dims(self) -> dict[FeatureName, int]:
        """The features that it has, with their widths."""

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        """Return features (b, width) fp32, on the extractor's device.

        Args:
            media: Pictures (b, c, h, w) or clips (b, c, f, h, w), uint8, of any size that `check_size` accepts.
            names: The features that are wanted, all of them in `dims`.
        """

    def check_size(self, *size: int) -> None:
        """Raise InputError if media of (height, width), or (frames, height, width), cannot be taken."""

    def to(self, device: torch.device | str) -> Extractor:
        """Move the network and return the extractor."""
