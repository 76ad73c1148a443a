"""One meaning of each filter, for pictures and for clips: that of weights which are computed here, in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

from pomscale.media import Filter  # noqa: E402
from pomscale.media.area import area_mean  # noqa: E402
from pomscale.media.frame_fitter import FrameFitter  # noqa: E402
from pomscale.media.pictures import fit_picture  # noqa: E402

# Height and width before and after, of one aspect ratio.
SIZES = [
    ((48, 48), (32, 32)), ((100, 160), (60, 96)), ((97, 97), (33, 33)), ((300, 300), (31, 31)), ((64, 96), (64, 96)),
    ((41, 41), (40, 40)), ((40, 40), (41, 41)), ((50, 80), (60, 96)), ((30, 30), (60, 60)),
]  # fmt: skip


def weights(old: int, new: int, kind: Filter) -> np.ndarray:
    """(new, old): the share of each old pixel in each new one. Beyond the edge lies the pixel at the edge, again."""
    scale, pixels = old / new, np.arange(old)
    if kind == "area" and scale >= 1:
        edges = np.linspace(0, old, new + 1)[:, None]
        return (np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)).clip(0) / scale
    beyond = np.arange(-4 * old, 5 * old)
    distances = (beyond - (np.arange(new)[:, None] + 0.5) * scale + 0.5) / max(scale, 1)
    if kind == "area":
        values = (1 - abs(distances)).clip(0)
    else:
        values = np.where(abs(distances) < 3, np.sinc(distances) * np.sinc(distances / 3), 0)
    folded = np.zeros((new, old))
    np.add.at(folded.T, beyond.clip(0, old - 1), values.T)
    return folded / folded.sum(1, keepdims=True)


def expected(pixels: np.ndarray, size: tuple[int, int], kind: Filter) -> np.ndarray:
    rows, columns = (weights(old, new, kind) for old, new in zip(pixels.shape[:2], size, strict=True))
    return np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(float), columns).clip(0, 255)


def as_picture(pixels: np.ndarray, size: tuple[int, int], kind: Filter) -> np.ndarray:
    return fit_picture(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), size, kind).astype(float)


def as_clip(pixels: np.ndarray, size: tuple[int, int], kind: Filter) -> np.ndarray:
    """Grey, as the decoder gives it: colours would pass through a matrix."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[..., 0]), format="gray")
    return FrameFitter(frame, Fraction(1), kind, 1).fit(frame, size).astype(float)


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("fit", [as_picture, as_clip])
def test_area_is_the_exact_mean(old: tuple[int, int], new: tuple[int, int], fit: object) -> None:
    """Without bias; and bilinear where a picture is enlarged."""
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 1), np.uint8)
    errors = fit(pixels, new, "area") - expected(pixels, new, "area")  # type: ignore[operator]
    assert abs(errors).max() <= 1.01  # Pillow rounds after each axis where it enlarges
    assert abs(errors.mean()) < 0.3


def test_stripes_become_an_even_grey() -> None:
    """Pillow's BOX makes 128 and 0 of them, and had been `area` of pictures."""
    stripes = np.where(np.arange(48) % 3 == 1, 255, 0).astype(np.uint8)[None, :, None].repeat(48, 0)
    for fit in (as_picture, as_clip):
        assert (fit(stripes, (32, 32), "area") == 85).all()


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("fit", [as_picture, as_clip])
def test_lanczos_is_the_windowed_sinc(old: tuple[int, int], new: tuple[int, int], fit: object) -> None:
    """Away from the edges, where Pillow leaves out what swscale repeats; smooth, since both clip after each axis."""
    rows, columns = np.meshgrid(np.arange(old[0]), np.arange(old[1]), indexing="ij")
    pixels = (128 + 50 * np.sin(rows / 3) + 50 * np.cos(columns / 2)).astype(np.uint8)[..., None]
    margin = 4 * max(1, -(-new[0] // old[0]))
    errors = (fit(pixels, new, "lanczos") - expected(pixels, new, "lanczos"))[margin:-margin, margin:-margin]  # type: ignore[operator]
    assert not errors.size or abs(errors).max() <= 1.25


@pytest.mark.parametrize("box", [(0, 0, 40, 30), (3, 2, 37.6, 27.8), (0, 0.5, 40, 29.9), (7, 7, 27, 22)])
def test_a_part_of_a_picture_with_fractions_of_pixels(box: tuple[float, float, float, float]) -> None:
    """By sampling: each pixel is a hundred by a hundred equal points."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    left, top, right, bottom = (round(100 * side) for side in box)
    points = pixels.repeat(100, 0).repeat(100, 1)[top:bottom, left:right]
    height, width = 15, 20
    rows = [block.mean(0) for block in np.split(points, height)]
    found = area_mean(pixels, box, (height, width))
    reference = np.stack([[part.mean(0) for part in np.split(row, width)] for row in rows])
    assert abs(found - reference).max() <= 0.51


def test_sums_of_many_rows_are_exact() -> None:
    """256 rows of white are the most that 16 bits hold."""
    for height in (256, 257, 258, 1000):
        assert (area_mean(np.full((height, 2, 1), 255, np.uint8), (0, 0, 2, height), (1, 1)) == 255).all()
