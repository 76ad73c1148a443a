"""The interface of sets of pictures and of clips that are measured: generated now, or read from files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pomscale.base.errors import InputError

QUANTISATION = "round(255 x) of x in [0, 1]"
"""Rule by which decoded values become bytes: the nearest of 256, as in EDM, DiT, SiT and JiT; ADM's script cuts off."""


Kind = Literal["pictures", "clips"]


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a clip that are measured: number 0, `stride`, 2 `stride` and so on, `num` of them."""

    num: int = 16
    stride: int = 1

    @property
    def span(self) -> int:
        """Frames from the first to the last one that is measured: shorter clips have too few."""
        return (self.num - 1) * self.stride + 1

    def __str__(self) -> str:
        return f"--measured-frames {self.num} --frame-stride {self.stride}"


@dataclass(frozen=True, slots=True)
class Failure:
    """One picture or clip that cannot be measured, and the reason on one line."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures or clips of one size.

    Attributes:
        numbers: Numbers of the pictures in their set, in ascending order.
        pixels: (b, c, h, w), or (b, c, f, h, w) of clips, uint8 on the CPU; b is 0 where none can be read.
        labels: Class ids of the pictures; None if the set has none.
        captions: Captions of the pictures; None if the set has none.
        failures: Pictures that belong here and cannot be read.
    """

    numbers: list[int]
    pixels: Tensor
    labels: list[int] | None = None
    captions: list[str] | None = None
    failures: list[Failure] = field(default_factory=list)


class PictureSet(Protocol):
    """A set of pictures, or of clips, in a fixed order, of which any process may read any part.

    Where nothing else is said, "pictures" stands for either.
    """

    @property
    def name(self) -> str:
        """Name for messages, as the user gave it."""

    @property
    def num_pictures(self) -> int: ...

    @property
    def num_channels(self) -> int:
        """Number of channels: 1 = grey, 3 = RGB."""

    @property
    def size(self) -> tuple[int, ...] | None:
        """Height and width in pixels, for clips (frames, height, width) as they are measured.

        None if it is known only when the first picture is there.
        """

    @property
    def frames(self) -> Frames | None:
        """The frames of each clip that are measured; None for pictures."""

    @property
    def fps(self) -> float | None:
        """Frames per second of the clips, before frames are left out; None for pictures, and where it is not known."""

    @property
    def has_captions(self) -> bool: ...

    @property
    def crop(self) -> dict[str, Any] | None:
        """The transform that cut and resized the pictures, as JSON (see `crops.crop_of`); None if it is not known."""

    def identity(self) -> dict[str, Any]:
        """Return JSON that changes where other pictures are read, without reading them. Paths count."""

    def settings(self) -> dict[str, Any]:
        """Return JSON that says what the pictures are, for the result."""

    def batches(self, begin: int, end: int, batch: int) -> Iterator[Batch]:
        """Yield pictures `begin` to `end` - 1 in order, at most `batch` at once, always cut in the same way."""


def kind_of(one: PictureSet) -> Kind:
    """Return what a set consists of."""
    return "pictures" if one.frames is None else "clips"


def checked_count(name: str, num: int | None, total: int, kind: Kind = "pictures") -> int:
    """Return the number of pictures to measure of `total`; None = all. InputError if there are fewer than `num`."""
    if num is not None and num > total:
        raise InputError(f"{name}: {num:,} {kind} are asked for, and {total:,} are here")
    return num or total


def spread(number: int, count: int, total: int) -> int:
    """Return the position of picture `number` of `count` that are taken from `total` at equal distances.

    Folders and tars are sorted by class, so the first ones would be of few classes.
    """
    return number * total // count


def to_pixels(name: str, values: Tensor) -> Tensor:
    """Return values in [0, 1] of any shape as uint8 on the CPU, by the rule QUANTISATION.

    Raises:
        InputError: A value is not finite, and would become black; the message begins with `name`.
    """
    if not values.isfinite().all():
        raise InputError(
            f"{name}: decoded pictures have values that are not finite; its weights are broken, or --precision is too "
            f"coarse for them"
        )
    return (values.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu()
