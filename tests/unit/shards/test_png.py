from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pomscale.shards.png import decode_png, encode_png


def picture(channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture that is smooth above and noise below."""
    pixels = np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    pixels[:, : height // 2] //= 50
    return pixels


def decoded(content: bytes, shape: tuple[int, ...], mirrored: bool = False) -> np.ndarray:
    out = np.full(shape, 77, np.uint8)
    decode_png(memoryview(content), out, mirrored)
    return out


@settings(deadline=None, max_examples=50)
@given(channels=st.sampled_from([1, 3]), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_it_is_what_pillow_reads_and_what_was_written(channels: int, height: int, width: int, seed: int) -> None:
    pixels = picture(channels, height, width, seed)
    content = encode_png(pixels)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        by_pillow = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(by_pillow, pixels)
    np.testing.assert_array_equal(decoded(content, pixels.shape), pixels)
    np.testing.assert_array_equal(decoded(content, pixels.shape, mirrored=True), pixels[..., ::-1])


def test_the_checksums_of_the_file_are_right() -> None:
    content = encode_png(picture(3, 5, 7))
    place, names = 8, []
    while place < len(content):
        length = int.from_bytes(content[place : place + 4])
        body, crc = content[place + 4 : place + 8 + length], content[place + 8 + length : place + 12 + length]
        assert zlib.crc32(body) == int.from_bytes(crc)
        names.append(body[:4])
        place += 12 + length
    assert names == [b"IHDR", b"IDAT", b"IEND"]


@pytest.mark.parametrize("cut", [0, 1, 20, 40, 60, -5, -1])
def test_a_file_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="is not a PNG as pomscale writes it"):
        decoded(encode_png(picture(3, 8, 8))[:cut], (3, 8, 8))


@pytest.mark.parametrize("shape", [(3, 8, 9), (3, 9, 8), (1, 8, 8)])
def test_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not a PNG as pomscale writes it of shape"):
        decoded(encode_png(picture(3, 8, 8)), shape)


def with_data(content: bytes, data: bytes) -> bytes:
    """The file with other compressed data, and the checksums right."""
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return content[:33] + chunk + content[-12:]


def test_wrong_data_is_refused() -> None:
    content = encode_png(picture(3, 8, 8))
    rows = zlib.decompress(content[41:-16])
    assert decoded(with_data(content, zlib.compress(rows)), (3, 8, 8)).shape == (3, 8, 8)
    for data, reason in (
        (zlib.compress(rows)[:-3], "cannot be decoded"),
        (zlib.compress(rows)[:-1] + b"\0", "cannot be decoded"),  # the sum that zlib keeps
        (zlib.compress(rows[:-1]), "filtered bytes"),
        (zlib.compress(rows + b"\0"), "filtered bytes"),
        (zlib.compress(b"\4" + rows[1:]), "another filter than Up"),
    ):
        with pytest.raises(ValueError, match=reason):
            decoded(with_data(content, data), (3, 8, 8))


def test_a_png_of_another_program_is_refused() -> None:
    stream = io.BytesIO()
    Image.fromarray(picture(1, 8, 8)[0]).save(stream, format="PNG")
    with pytest.raises(ValueError, match=r"another filter than Up|is not a PNG as pomscale writes it"):
        decoded(stream.getvalue(), (1, 8, 8))
