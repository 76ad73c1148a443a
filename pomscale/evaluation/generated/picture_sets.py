"""The interface of sets of pictures that are measured: generated now, or read from files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pomscale.base.errors import InputError

QUANTISATION = "round(255 x) of x in [0, 1]"
"""Rule by which decoded values become bytes: the nearest of 256, as in EDM, DiT, SiT and JiT; ADM's script cuts off."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One picture that cannot be read, and the reason on one line."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one size.

    Attributes:
        numbers: Numbers of the pictures in their set, in ascending order.
        pixels: (b, c, h, w) uint8 on the CPU; b is 0 where none can be read.
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
    """A set of pictures, in a fixed order, of which any process may read any part."""

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
        """Height and width in pixels; None if it is known only when the first picture is there."""

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


def checked_count(name: str, num: int | None, total: int) -> int:
    """Return the number of pictures to measure of `total`; None = all. InputError if there are fewer than `num`."""
    if num is not None and num > total:
        raise InputError(f"{name}: {num:,} pictures are asked for, and {total:,} are here")
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
