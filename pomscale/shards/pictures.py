"""Pictures as the shards of codec uint8 store them: .npy members, or PNG files.

The module lies here, below both `data`, which trains on them, and the pipelines that write and check them.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from pomscale.shards.index import npy_header, to_npy
from pomscale.shards.png import decode_png, encode_png

Coding = Literal["raw", "png"]


def pack_picture(pixels: np.ndarray, coding: Coding) -> bytes:
    """Return the member of a tar that holds a picture (c, h, w) uint8."""
    return encode_png(pixels) if coding == "png" else to_npy(pixels)


def unpack_picture(content: memoryview, coding: Coding, out: np.ndarray, mirrored: bool) -> None:
    """Write the picture in a member into `out`, (c, h, w) uint8, contiguous; mirror it if `mirrored`.

    Raw, each byte is copied once, out of `content`; the interpreter lock is free meanwhile. Raises ValueError, the rest
    of a sentence on the member, if it holds no picture of this shape.
    """
    if coding == "png":
        decode_png(content, out, mirrored)
        return
    header = _header(out.shape)
    if len(content) != len(header) + out.size or content[: len(header)] != header:
        raise ValueError(f"is not a uint8 array of shape {out.shape}")
    pixels = np.frombuffer(content, np.uint8, offset=len(header)).reshape(out.shape)
    np.copyto(out, pixels[..., ::-1] if mirrored else pixels)


@functools.lru_cache(maxsize=64)
def _header(shape: tuple[int, ...]) -> bytes:
    return npy_header(shape, np.uint8)
