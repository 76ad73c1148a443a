"""The interfaces of feature extractors, whose features metrics compare, and of teachers, whose features are learned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pomscale.base.errors import InputError

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
    def num_channels(self) -> Literal[1, 3] | None:
        """Channels of the pictures that it takes; None for either."""

    @property
    def takes_clips(self) -> bool:
        """Whether it takes clips, and not pictures."""

    @property
    def dims(self) -> Mapping[FeatureName, int | None]:
        """The features that it has, with their widths; None for a width that follows the pictures' size."""

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        """Return features (b, width) fp32, on the extractor's device.

        Args:
            media: Pictures (b, c, h, w) or clips (b, c, f, h, w), uint8, of any size that `check_size` accepts.
            names: The features that are wanted, all of them in `dims`.

        Raises:
            InputError: The media have another number of channels, or are of the other kind.
        """

    def check_size(self, *size: int) -> None:
        """Raise InputError if media of (height, width), or (frames, height, width), cannot be taken."""

    def to(self, device: torch.device | str) -> Extractor:
        """Move the network and return the extractor."""


class Teacher(Protocol):
    """A frozen network with all that comes before it, which gives features of a picture place by place."""

    @property
    def name(self) -> str:
        """Name as it is asked for, without the path: "dinov2", "torchscript" ..."""

    @property
    def identity(self) -> str:
        """sha256 (hex) of network, weights and preprocessing: teachers of equal identity give equal features."""

    @property
    def num_channels(self) -> Literal[1, 3]:
        """Channels of the pictures that it takes."""

    def map_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (d, rows, columns) of the map of a picture of a size in pixels.

        Raises InputError for a size that it does not take.
        """

    def feature_map(self, pictures: Tensor) -> Tensor:
        """Return maps (b, d, rows, columns) fp32, on the teacher's device, of pictures (b, c, h, w) uint8."""

    def to(self, device: torch.device | str) -> Teacher:
        """Move the network and return the teacher."""


def check_media(extractor: Extractor, media: Tensor, names: tuple[FeatureName, ...]) -> None:
    """Raise InputError if the media, or a feature that is asked for, are not those of the extractor."""
    kind = "clips" if extractor.takes_clips else "pictures"
    axes = 5 if extractor.takes_clips else 4
    if media.ndim != axes or media.dtype != torch.uint8:
        raise InputError(
            f"extractor {extractor.name}: it takes {kind}, uint8 of {axes} axes, and not {media.dtype} of "
            f"{tuple(media.shape)}"
        )
    if extractor.num_channels not in (None, media.shape[1]):
        colour = {1: "grey", 3: "colour"}
        raise InputError(
            f"extractor {extractor.name}: it takes {colour[extractor.num_channels or 3]} {kind} "
            f"({extractor.num_channels} channels), and these have {media.shape[1]}; choose another extractor, or "
            f"convert the {kind}"
        )
    missing = [name for name in names if name not in extractor.dims]
    if missing:
        raise InputError(
            f"extractor {extractor.name}: it has no {' and no '.join(missing)} features, only "
            f"{', '.join(extractor.dims)}"
        )
    extractor.check_size(*media.shape[2:])


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Compute features in fp32 and without a graph, whatever surrounds the call: autocast would change them."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def weights_identity(tag: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of a description of architecture and preprocessing, and of tensors by name."""
    digest = hashlib.sha256(tag.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
