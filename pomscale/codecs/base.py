"""The interfaces of codecs (pictures and clips to latents and back) and of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pomscale.config.codecs import CodecConfig
from pomscale.config.text import TextEncoderConfig


class Codec(Protocol):
    """Pictures (b, 1|3, H, W) or clips (b, 3, f, H, W), float32 in [0, 1], to latents (b, c, ...) and back.

    Stored latents are unscaled. They are either one sample per picture (b, c, ...), or, where `stores_moments`,
    the posterior's mean and log-variance stacked on the channel axis (b, 2c, ...). A network is trained on
    (latent - shift) * scaling_factor, with one number for all channels or one for each.
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> CodecConfig: ...

    @property
    def num_channels_in(self) -> int:
        """Channels of pictures: 1 = grey, 3 = RGB."""

    @property
    def scaling_factor(self) -> float | tuple[float, ...]: ...

    @property
    def shift(self) -> float | tuple[float, ...]: ...

    @property
    def stored_dtype(self) -> Literal["float16", "uint8"]:
        """Type of stored latents; uint8: they are the pixels, to the bit, and need no encode."""

    @property
    def stores_moments(self) -> bool: ...

    @property
    def needs_noise(self) -> bool:
        """Whether `encode` draws from a posterior, with noise that the caller keys and passes in."""

    @property
    def device(self) -> torch.device: ...

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """Return the shape of a latent: (c, h, w) of (height, width), (c, f, h, w) of (frames, height, width) pixels.

        Raises InputError for sizes that do not fit.
        """

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return stored latents, float32, on the codec's device. `noise`: standard normal (b, c, ...), if needed."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures or clips, float32 in [0, 1], of unscaled latents (b, c, ...)."""

    def identity(self) -> str:
        """Return the sha256 (hex) of the network: codecs of equal identity decode each other's latents.

        The config has the format of stored latents and the precision of the encoder.
        """

    def to(self, device: torch.device | str) -> Codec:
        """Move the codec and return it."""


class ClipDecoder(Protocol):
    """Decodes clips chunk by chunk, with the frames of `Codec.decode` of whole clips. Its state does not grow."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return all frames that are complete by now, (b 1|3 F H W) float32 in [0, 1]; F may be 0.

        `latents` are the unscaled ones (b c f h w) of the next frames.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state, with which `load_state_dict` continues exactly.

        Raises InputError where the codec continues no clips.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state. Raises InputError for that of another codec."""


@runtime_checkable
class ClipCodec(Codec, Protocol):
    """A codec that takes clips."""

    @property
    def factor(self) -> int:
        """Height and width in pixels over those of latents."""

    @property
    def latent_batch(self) -> int:
        """Latent frames that are decoded together; a clip is continued by multiples of it."""

    @property
    def continues(self) -> bool:
        """Whether its decoders give frames chunk by chunk, and continue clips; else they wait for the whole clip."""

    def num_pixel_frames(self, latent_frames: int) -> int:
        """Return the number of frames of a clip of so many latent frames."""

    def decoder(self, latent_frames: int) -> ClipDecoder:
        """Return a decoder for clips that begin with so many latent frames, and may then be continued."""


class TextEncoder(Protocol):
    """Turns captions into sequences of embeddings: one encoder, or several side by side."""

    @property
    def parts(self) -> Sequence[SingleTextEncoder]:
        """The encoders of which it consists, in the order of their embeddings."""

    @property
    def dim(self) -> int: ...

    @property
    def max_length(self) -> int:
        """Longest embeddings of a caption, in tokens."""

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return (n, dim) float32 per caption; n is 1 to max_length. The empty caption is allowed."""

    def identity(self) -> str:
        """Return the sha256 (hex) of network and tokenizer: equal identities give equal embeddings."""

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder and return it."""


class SingleTextEncoder(TextEncoder, Protocol):
    """One text encoder."""

    @property
    def config(self) -> TextEncoderConfig:
        """The section that makes the same encoder, without anything that is left to a convention."""

    @property
    def max_tokens(self) -> int:
        """Most tokens that are kept of a caption."""

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens per caption, the end token included; `encode` cuts those beyond max_tokens."""
