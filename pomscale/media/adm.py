"""The crop of ADM, with which the pictures of DiT, SiT and JiT are trained on and measured."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pomscale.media import UnreadableMediaError

# Most pixels of the resized picture before its square is cut out: a long strip would fill the memory.
_MAX_RESIZED_PIXELS = 2**26


def adm_crop(image: Image.Image, side: int) -> np.ndarray:
    """Return the centre square of a picture, `side` pixels wide: (side, side) or (side, side, channels) uint8.

    The picture is halved (BOX, sides rounded down) while its shorter side is at least twice the target, resized
    (BICUBIC) so that its shorter side is the target, and cut. Source: Dhariwal and Nichol, "Diffusion models beat GANs
    on image synthesis", 2021, whose code JiT and others have taken over; equal to it to the bit for upright pictures
    without transparency.

    Raises:
        UnreadableMediaError: The picture is so long a strip that the resized one has more than 67 megapixels.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    if width * height > _MAX_RESIZED_PIXELS:
        raise UnreadableMediaError(f"is too long a strip for the crop of ADM: {width}x{height} pixels once resized")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]
