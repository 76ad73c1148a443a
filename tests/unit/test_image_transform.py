from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.images.transform import UnreadablePictureError, load_picture, to_images
from pomscale.config.schema import ImageTransformConfig


def load(path: Path, image: Image.Image, size: int, channels: int = 3, **save: object) -> np.ndarray:
    image.save(path, **save)
    return load_picture(path, ImageTransformConfig(size=size, filter="area"), channels).pixels


@pytest.mark.parametrize(("width", "height"), [(8, 8), (31, 8), (8, 31), (5, 3), (100, 99), (1, 1), (1000, 3)])
@pytest.mark.parametrize("kind", ["lanczos", "area"])
def test_any_size_becomes_the_square(tmp_path: Path, width: int, height: int, kind: str) -> None:
    Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / "x.png")
    picture = load_picture(tmp_path / "x.png", ImageTransformConfig.model_validate({"size": 8, "filter": kind}), 3)
    assert picture.pixels.shape == (8, 8, 3)
    assert (picture.pixels == (10, 20, 30)).all()
    assert (picture.width, picture.height) == (width, height)


def test_pictures_of_the_right_size_are_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    np.testing.assert_array_equal(load(tmp_path / "x.png", Image.fromarray(pixels), 8, 1)[..., 0], pixels)
    assert to_images([load_picture(tmp_path / "x.png", ImageTransformConfig(size=8), 1)]).shape == (1, 1, 8, 8)


def test_the_crop_is_central(tmp_path: Path) -> None:
    pixels = np.zeros((4, 10), np.uint8)
    pixels[:, 3:7] = 255
    assert (load(tmp_path / "x.png", Image.fromarray(pixels), 4, 1) == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: white goes to the right
    turned = load(tmp_path / "x.jpg", Image.fromarray(pixels), 8, exif=exif, quality=100)
    assert turned[:, :3].max() < 20
    assert turned[:, 5:].min() > 235


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    assert (load(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    assert (load(tmp_path / "p.png", palette, 4, 1, transparency=0) == 255).all()
    assert (load(tmp_path / "la.png", Image.new("LA", (4, 4), (0, 255)), 4) == 0).all()


def test_more_than_8_bits_are_refused_not_clipped(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePictureError, match="more than 8 bits"):
        load(tmp_path / "x.png", Image.fromarray(np.full((4, 4), 40000, np.uint16)), 4)


def test_damaged_files_are_unreadable_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = {}
    for extension in ("png", "jpg", "webp"):
        path = tmp_path / f"x.{extension}"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        whole[extension] = path.read_bytes()
    transform = ImageTransformConfig(size=8)
    for extension, content in whole.items():
        path = tmp_path / f"bad.{extension}"
        for damaged in (b"", b"garbage", content[: len(content) // 2], content[:40]):
            path.write_bytes(damaged)
            with pytest.raises(UnreadablePictureError) as caught:
                load_picture(path, transform, 3)
            assert "\n" not in str(caught.value)
        # Bytes turned at random either still decode or are listed; nothing else escapes.
        for _ in range(60):
            noisy = bytearray(content)
            for place in rng.integers(0, len(noisy), 5):
                noisy[place] ^= int(rng.integers(1, 256))
            path.write_bytes(bytes(noisy))
            try:
                load_picture(path, transform, 3)
            except UnreadablePictureError:
                continue
