from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pomscale.media import UnreadableMediaError
from pomscale.media.pictures import fit_picture


def restated(image: Image.Image, side: int) -> np.ndarray:
    """The crop in Pillow's own terms, to its last step, which is `crop`."""
    while image.width >= 2 * side and image.height >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = side / min(image.width, image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "size", [(50, 37), (37, 50), (16, 16), (31, 33), (32, 64), (65, 129), (7, 11), (5, 300), (256, 256), (127, 40)]
)
def test_it_is_pillows_to_the_bit(mode: str, size: tuple[int, int]) -> None:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert image.mode == mode
    for side in (8, 15, 16):
        found = fit_picture(image, (side, side), "adm")
        assert found.shape == (side, side, len(mode))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found.squeeze(), restated(image, side))


def test_it_is_not_the_crop_of_the_other_filters() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    others = [fit_picture(image, (16, 16), kind) for kind in ("lanczos", "area")]
    assert all((fit_picture(image, (16, 16), "adm") != other).any() for other in others)


def test_a_long_strip_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(UnreadableMediaError, match="too long a strip for the crop of ADM: 5120000x256 pixels"):
        fit_picture(Image.new("L", (20_000, 1)), (256, 256), "adm")
