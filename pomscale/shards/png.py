"""PNG files that decode fast: every reader of PNG opens them, and `decode_png` reads no others.

PNG lets a writer choose a filter for each row (W3C, Portable Network Graphics, section 9). Here all rows have the
filter Up, differences from the row above, whose inverse is a few sums over whole rows, where that of the usual choice,
Paeth, goes from byte to byte. Deflate is of isal, at several times the speed of zlib. Files are about a tenth larger
than those that Pillow writes at its default level.
"""

from __future__ import annotations

import functools
import math
import struct

import numpy as np
from isal import isal_zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # by number of channels: grey, RGB
_UP = 2
_LEVEL = 1  # isal's further levels take half as long again, and save nothing on filtered photographs


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of a picture (1|3, height, width) uint8."""
    channels, height, width = pixels.shape
    interleaved = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = interleaved[0]
    np.subtract(interleaved[1:], interleaved[:-1], out=rows[1:, 1:])
    return _head(pixels.shape) + _chunk(b"IDAT", isal_zlib.compress(rows, _LEVEL)) + _END


def decode_png(content: memoryview | bytes, out: np.ndarray, mirrored: bool) -> None:
    """Decode a file of `encode_png` into `out`, (1|3, height, width) uint8, contiguous; mirror it if `mirrored`.

    Inflated bytes are copied once, into `out`, and summed there. Other threads run meanwhile. Raises ValueError if
    `content` is no such file of this shape.
    """
    channels, height, width = out.shape
    rows = np.frombuffer(_inflated(content, out.shape), np.uint8).reshape(height, 1 + width * channels)
    if (rows[:, 0] != _UP).any():
        raise ValueError("is a PNG with another filter than Up, which pomscale does not write")
    differences = rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)
    np.copyto(out, differences[..., ::-1] if mirrored else differences)
    _sum_rows(out)


def _inflated(content: memoryview | bytes, shape: tuple[int, ...]) -> bytes:
    """Return the filtered rows of a file, as many bytes as `shape` calls for."""
    head, (channels, height, width) = _head(shape), shape
    begin, end = len(head) + 8, len(content) - len(_END) - 4
    size = struct.pack(">I", max(end - begin, 0))
    if content[:begin] != head + size + b"IDAT" or content[-len(_END) :] != _END:
        raise ValueError(f"is not a PNG as pomscale writes it of shape {shape}")
    num_bytes = height * (1 + width * channels)
    try:
        # A buffer that is full at the end would be doubled, and copied, before isal sees that nothing follows.
        rows = isal_zlib.decompress(content[begin:end], isal_zlib.MAX_WBITS, num_bytes + 1)
    except isal_zlib.error as error:
        raise ValueError(f"is a PNG that cannot be decoded: {error}") from error
    if len(rows) != num_bytes:
        raise ValueError(f"is a PNG of {len(rows):,} filtered bytes, and {shape} has {num_bytes:,}")
    return rows


def _sum_rows(pixels: np.ndarray) -> None:
    """Replace each row of (channels, height, width) uint8 by the sum of all rows down to it, modulo 256.

    About 2 sqrt(height) calls of NumPy, each over many rows: sums inside of blocks of rows, then over the blocks.
    np.add.accumulate gives the same in five times the time; += would copy its result onto itself.
    """
    channels, height, width = pixels.shape
    step = math.isqrt(height)
    whole = height // step * step
    blocks = pixels[:, :whole].reshape(channels, -1, step, width)
    for row in range(1, step):
        np.add(blocks[:, :, row], blocks[:, :, row - 1], out=blocks[:, :, row])
    for block in range(1, blocks.shape[1]):
        np.add(blocks[:, block], blocks[:, block - 1, -1:], out=blocks[:, block])
    for row in range(whole, height):
        np.add(pixels[:, row], pixels[:, row - 1], out=pixels[:, row])


@functools.lru_cache(maxsize=64)
def _head(shape: tuple[int, ...]) -> bytes:
    """Return the bytes in front of the chunk with the pixels."""
    channels, height, width = shape
    return _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", isal_zlib.crc32(data, isal_zlib.crc32(name)))


_END = _chunk(b"IEND", b"")
