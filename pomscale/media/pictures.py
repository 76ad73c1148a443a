"""Decode picture files to pixels of one size, and write pixels to PNG files."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pomscale.media import PictureFilter, UnreadableMediaError
from pomscale.media.adm import adm_crop
from pomscale.media.area import area_mean

_FORMATS = ("PNG", "JPEG", "WEBP")

# Transposition that turns a picture of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Errors of Pillow for files that are damaged or cut off, and for damaged EXIF and XMP.
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
)

# Pillow's modes of files that have no colours.
_GREY_MODES = ("1", "L", "LA", "La")

# Larger files are no pictures that anyone meant to train on, and would fill the memory of a decode thread.
MAX_PICTURE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """A decoded picture, and the size and kind of its file."""

    image: Image.Image  # upright, mode L or RGB
    width: int  # before the picture was turned upright
    height: int
    is_grey: bool  # whether the file has grey values alone


def decode_picture(stream: BinaryIO, num_channels: int) -> DecodedPicture:
    """Read a PNG, JPEG or WebP file, turn it upright (EXIF) and convert it to grey (1 channel) or RGB (3).

    Transparent pixels are laid on white. Raises UnreadableMediaError if that is impossible or the file is larger than
    MAX_PICTURE_BYTES. Errors of `stream.read` are passed on, since they say nothing about the picture.
    """
    content = stream.read(MAX_PICTURE_BYTES + 1)
    if len(content) > MAX_PICTURE_BYTES:
        raise UnreadableMediaError(f"has more than {MAX_PICTURE_BYTES >> 20} MiB")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as file:
            (width, height), is_grey = file.size, file.mode in _GREY_MODES
            flat = _flatten(file, num_channels)
            # Only the tag is read: ImageOps.exif_transpose also writes EXIF again, and fails where it is damaged.
            orientation = file.getexif().get(ExifTags.Base.Orientation)
        image = flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat
    except UnidentifiedImageError as error:
        raise UnreadableMediaError("no PNG, JPEG or WebP picture") from error
    except Image.DecompressionBombError as error:
        raise UnreadableMediaError(
            f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels, the most that are decoded, since "
            f"a small file could fill the memory; make it smaller first, for example with: magick OLD -resize 50% NEW"
        ) from error
    except _DECODER_ERRORS as error:
        raise UnreadableMediaError.of(error) from error
    return DecodedPicture(image, width, height, is_grey)


def fit_picture(image: Image.Image, target: tuple[int, int], filter: PictureFilter) -> np.ndarray:
    """Return the central box of the target's aspect ratio, resized to `target` = (height, width).

    Filter "area" is the mean over the area of each new pixel, and bilinear where a picture is enlarged, as it is for
    clips; filter "adm", for squares, is `adm_crop`. The result is (height, width, channels) uint8.
    """
    height, width = target
    if filter == "adm":
        return adm_crop(image, height).reshape(height, width, len(image.getbands()))
    # Cut and resized in one go: a long strip, resized as a whole, takes any amount of memory.
    box = _central_box((image.height, image.width), target)
    is_reduced = box[2] - box[0] >= width and box[3] - box[1] >= height
    if filter == "area" and is_reduced:
        return area_mean(np.asarray(image).reshape(image.height, image.width, len(image.getbands())), box, target)
    resampling = Image.Resampling.LANCZOS if filter == "lanczos" else Image.Resampling.BILINEAR
    fitted = image.resize((width, height), resampling, box)
    return np.asarray(fitted).reshape(height, width, len(image.getbands()))


def _central_box(size: tuple[float, float], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the largest central box with the target's aspect ratio.

    Sizes are (height, width). The corner lies on whole pixels, so that a picture of the right size is not blurred.
    """
    height, width = size
    if height * target[1] <= width * target[0]:
        box_height, box_width = height, height * target[1] / target[0]
    else:
        box_height, box_width = width * target[0] / target[1], width
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _flatten(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit greys to white without a warning.
        raise ValueError(f"pixels of more than 8 bits (Pillow mode {image.mode}); convert the file to 8 bits")
    mode = "L" if num_channels == 1 else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)


def read_grey(path: Path) -> np.ndarray:
    """Return the pixels of a grey picture file, (h, w) uint8."""
    with path.open("rb") as stream:
        return np.asarray(decode_picture(stream, 1).image)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write pixels, (h, w) grey or (h, w, 3) RGB uint8, to a PNG."""
    Image.fromarray(pixels).save(path, format="PNG")
