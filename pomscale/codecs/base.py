"""The interfaces of codecs (pictures and clips to latents and back) and of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pomscale.config.codecs import CodecConfig, TextEncoderConfig


class Codec(Protocol):
    """Pictures (b, 1|3, H, W) or clips (b, 3, f, H, W), float32 in [0, 1], to latents (b, c, ...) and back.

    Stored latents are unscaled. They are either one sample per picture (b, c, ...), or, where `stores_moments`,
    the posterior's mean and log-variance stacked on the channel axis (b, 2c, ...). A network is trained on
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

    @property
    def device(self) -> torch.device: ...

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """Shape of one latent, (c, h, w) or (c, f, h, w), of (height, width) or (frames, height, width) pixels.

        InputError for sizes that do not fit.
        """

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Stored latents, float32, on the codec's device. `noise`: (b, c, ...) standard normal if `needs_noise`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures or clips, float32 in [0, 1], of unscaled latents (b, c, ...)."""

    def identity(self) -> str:
        """sha256 (hex) of the network: equal identities decode each other's latents.

        What is stored of a picture, and in which precision it was encoded, are the config's to tell.
        """

    def to(self, device: torch.device | str) -> Codec:
        """Moves the codec and returns it."""


class ClipDecoder(Protocol):
    """Latents of clips to pixels chunk by chunk, as `Codec.decode` of whole clips. What it carries does not grow."""

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (b c f h w) of the next frames -> all frames that are complete by now, (b 1|3 F H W) float32
        in [0, 1]; F may be 0."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that is carried, to go on exactly with `load_state_dict`."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """InputError for the state of another codec."""


@runtime_checkable
class ClipCodec(Codec, Protocol):
    """A codec that takes clips."""

    @property
    def factor(self) -> int:
        """Height and width in pixels over those of latents."""

    @property
    def latent_batch(self) -> int:
        """Latent frames that are decoded together; what a clip is continued by is a multiple of it."""

    def num_pixel_frames(self, latent_frames: int) -> int:
        """Frames of a clip of so many latent frames."""

    def decoder(self, latent_frames: int) -> ClipDecoder:
        """For clips that begin with so many latent frames, and may then be continued."""


class TextEncoder(Protocol):
    """Captions to sequences of embeddings."""

    @property
    def config(self) -> TextEncoderConfig: ...

    @property
    def dim(self) -> int: ...

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Per caption (n, dim) float32, without padding; n is 1 to max_length. The empty caption is allowed."""

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Of each caption, the end token included; `encode` cuts those with more than max_length."""

    def identity(self) -> str:
        """sha256 (hex) of network and tokenizer: equal identities give equal embeddings."""

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves the encoder and returns it."""
