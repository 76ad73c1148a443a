"""Colours and transparency of clips."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

from pomscale.media import Filter, UnreadableMediaError  # noqa: E402
from pomscale.media.clips import decode_clip  # noqa: E402
from pomscale.media.frame_fitter import FrameFitter  # noqa: E402
from pomscale.media.pictures import decode_picture, fit_picture  # noqa: E402

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)], np.uint8)
# Shares of red and blue in luma.
BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


def bars(height: int, width: int) -> np.ndarray:
    return np.broadcast_to(COLOURS[np.arange(width) * len(COLOURS) // width], (height, width, 3))


def coded(rgb: np.ndarray, shares: tuple[float, float]) -> Any:
    """An untagged frame of planar YUV 4:4:4, by the definition."""
    red, blue = shares
    r, g, b = np.moveaxis(rgb / 255.0, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [219 * luma + 16, 112 * (b - luma) / (1 - blue) + 128, 112 * (r - luma) / (1 - red) + 128]
    return av.VideoFrame.from_ndarray(np.stack(planes).round().astype(np.uint8), format="yuv444p")


@pytest.mark.parametrize(
    ("height", "width", "shares"),
    [(480, 640, BT601), (576, 720, BT601), (90, 1279, BT601), (90, 1280, BT709), (576, 96, BT601), (577, 96, BT709)],
)
def test_untagged_frames_are_read_by_their_size(height: int, width: int, shares: tuple[float, float]) -> None:
    frame = coded(bars(height, width), shares)
    assert frame.colorspace == 2
    fitted = FrameFitter(frame, Fraction(1), "area", 3).fit(frame, (height, width))
    assert np.abs(fitted.astype(int) - bars(height, width)).max() <= 3


def test_an_untagged_file_is_read_by_its_size(tmp_path: Path) -> None:
    for height, shares in ((576, BT601), (592, BT709)):
        with av.open(str(tmp_path / "x.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=4, options={"qp": "1", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 96, height, "yuv444p"
            frame = coded(bars(height, 96), shares)
            for number in range(2):
                frame.pts, frame.time_base = number, Fraction(1, 4)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        clip = decode_clip(io.BytesIO((tmp_path / "x.mp4").read_bytes()), [(2, height, 96)], 4, "area")
        assert np.abs(clip.frames[0, height // 2, 8::16].astype(int) - COLOURS).max() <= 4


def test_a_matrix_that_swscale_does_not_know_is_refused() -> None:
    """It would be read as BT.601, without a word."""
    frame = coded(bars(64, 96), BT601)
    frame.colorspace = 8  # YCgCo
    with pytest.raises(UnreadableMediaError, match=r"colours have the matrix 8 of ITU-T H\.273.*ffmpeg -i OLD"):
        FrameFitter(frame, Fraction(1), "area", 3).fit(frame, (64, 96))


def partly_transparent(height: int, width: int) -> np.ndarray:
    """(h, w, 4): a colour that is opaque, then half opaque, and another one that is hidden."""
    pixels = np.full((height, width, 4), (10, 200, 30, 0), np.uint8)
    pixels[:, : width // 3] = 220, 40, 60, 255
    pixels[:, width // 3 : 2 * width // 3] = 220, 40, 60, 128
    return pixels


FILES = [
    ("webm", "libvpx-vp9", "yuva420p"), ("webm", "libvpx", "yuva420p"), ("mov", "qtrle", "argb"),
    ("mov", "png", "rgba"), ("mov", "prores_ks", "yuva444p10le"), ("mkv", "ffv1", "yuva420p"),
    ("avi", "rawvideo", "bgra"),
]  # fmt: skip


@pytest.mark.parametrize(("extension", "codec", "pixel_format"), FILES)
@pytest.mark.parametrize("kind", ["area", "lanczos"])
def test_transparent_clips_lie_on_white_as_pictures_do(
    tmp_path: Path, extension: str, codec: str, pixel_format: str, kind: Filter
) -> None:
    pixels = partly_transparent(60, 96)
    options = {"libvpx-vp9": {"crf": "4", "cpu-used": "8"}, "libvpx": {"b": "4M", "auto-alt-ref": "0"}}.get(codec, {})
    with av.open(str(tmp_path / f"x.{extension}"), "w") as container:
        stream = container.add_stream(codec, rate=4, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 60, pixel_format
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
            frame.pts, frame.time_base = number, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = io.BytesIO((tmp_path / f"x.{extension}").read_bytes())
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for size, channels in (((60, 96), 3), ((25, 40), 3), ((25, 40), 1)):
        with (tmp_path / "x.png").open("rb") as stream:
            expected = fit_picture(decode_picture(stream, channels).image, size, kind).astype(int)
        clip = decode_clip(content, [(4, *size)], 4, kind, channels)
        errors = np.abs(clip.frames.astype(int) - expected)
        # Beside the borders, where codecs and colours of half the size blur.
        third = size[1] // 3
        for begin in (0, third, 2 * third):
            assert errors[:, :, begin + 3 : begin + third - 3].max() <= 6, (size, channels, begin)
        if pixel_format in ("argb", "rgba", "bgra"):
            assert errors.max() <= (3 if kind == "area" else 12)  # lanczos is another one at the edges
