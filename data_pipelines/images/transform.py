"""From a picture file to square pixels of one size."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pomscale.config.schema import ImageTransformConfig

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}

# What Pillow's decoders raise for files that are damaged, cut off, or no pictures at all.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadablePictureError(Exception):
    """One picture cannot be used. The message is the reason, on one line."""


@dataclass(frozen=True, slots=True)
class Picture:
    pixels: np.ndarray  # (size, size, 1|3) uint8
    width: int  # of the file, before orientation and resizing
    height: int


def load_picture(path: Path, transform: ImageTransformConfig, num_channels: int) -> Picture:
    """Reads, turns upright (EXIF), converts to grey or RGB, resizes the shorter side, crops the centre.

    Smaller pictures are enlarged. Transparency is laid on white. UnreadablePictureError if that is impossible.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            upright = ImageOps.exif_transpose(file)
            image = _crop(_resize(_flatten(upright, num_channels), transform), transform.size)
    except _DECODER_ERRORS as error:
        raise UnreadablePictureError(" ".join(f"{type(error).__name__}: {error}".split())) from error
    return Picture(np.asarray(image).reshape(transform.size, transform.size, num_channels), width, height)


def to_images(pictures: list[Picture]) -> Tensor:
    """(b, 1|3, size, size) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 255.0


def _flatten(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit greys to white without a word.
        raise ValueError(f"pixels of more than 8 bits (Pillow mode {image.mode}); convert the file to 8 bits")
    mode = "L" if num_channels == 1 else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)


def _resize(image: Image.Image, transform: ImageTransformConfig) -> Image.Image:
    shorter = min(image.size)
    if shorter == transform.size:
        return image
    width, height = (max(transform.size, round(side * transform.size / shorter)) for side in image.size)
    return image.resize((width, height), _FILTERS[transform.filter])


def _crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
