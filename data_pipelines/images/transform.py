"""From a picture file to square pixels of one size."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pomscale.config.schema import ImageTransformConfig
from pomscale.errors import PomscaleError

_FORMATS = ("PNG", "JPEG", "WEBP")
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}

# What turns a picture of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises for files that are damaged or cut off, and for damaged EXIF and XMP.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadablePictureError(Exception):
    """One picture cannot be used. The message is the reason, on one line."""


@dataclass(frozen=True, slots=True)
class Picture:
    pixels: np.ndarray  # (size, size, 1|3) uint8
    width: int  # of the file, before orientation and resizing
    height: int


def load_picture(path: Path, transform: ImageTransformConfig, num_channels: int) -> Picture:
    """Reads, converts to grey or RGB, turns upright (EXIF), resizes the central square.

    Smaller pictures are enlarged. Transparency is laid on white. UnreadablePictureError if that is impossible,
    PomscaleError if the disk does not give the file's bytes, which says nothing about the picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PomscaleError(f"cannot read {path}: {error}. Run the same command again, it goes on from here") from error
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as file:
            width, height = file.size
            flat = _flatten(file, num_channels)
            # Only the tag is read: ImageOps.exif_transpose writes EXIF anew as well, and fails where it is damaged.
            orientation = file.getexif().get(ExifTags.Base.Orientation)
        upright = flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat
        image = _resize(upright, transform)
    except UnidentifiedImageError as error:
        raise UnreadablePictureError("no PNG, JPEG or WebP picture") from error
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
    """The central square, cut and resized in one go: a long strip, resized as a whole, takes any amount of memory."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((transform.size, transform.size), _FILTERS[transform.filter], box)
