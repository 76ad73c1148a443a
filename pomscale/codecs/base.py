"""The interface of every image codec."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pomscale.config.schema import CodecConfig


class Codec(Protocol):
    """Pictures (b, 1|3, H, W), float32 in [0, 1], to latents (b, c, h, w) and back.

    Stored latents are unscaled. They are either one sample per picture (b, c, h, w), or, where `stores_moments`,
    the posterior's mean and log-variance stacked on the channel axis (b, 2c, h, w). A network is trained on
    (latent - shift) * scaling_factor.
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> CodecConfig: ...

    @property
    def num_channels_in(self) -> int:
        """1 = grey, 3 = RGB."""

    @property
    def scaling_factor(self) -> float: ...

    @property
    def shift(self) -> float: ...

    @property
    def stores_moments(self) -> bool: ...

    @property
    def needs_noise(self) -> bool:
        """Whether `encode` draws from a posterior, with noise that the caller keys and passes in."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of one latent of a picture of height x width pixels. InputError for sizes that do not fit."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Stored latents, float32, on the codec's device. `noise`: (b, c, h, w) standard normal if `needs_noise`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (b, 1|3, H, W), float32 in [0, 1], of unscaled latents (b, c, h, w)."""

    def identity(self) -> str:
        """sha256 (hex) of the network: equal identities decode each other's latents.

        What is stored of a picture, and in which precision it was encoded, are the config's to tell.
        """

    def to(self, device: torch.device | str) -> Codec:
        """Moves the codec and returns it."""
