from __future__ import annotations

import contextlib
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from data_pipelines.images.transform import UnreadablePictureError, load_picture, to_images
from pomscale.config.schema import ImageTransformConfig
from pomscale.errors import PomscaleError


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


def files(pixels: np.ndarray) -> list[tuple[str, dict[str, object]]]:
    """Formats and options to save with: each way to say that a picture is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    exif[0x011A] = 72.0
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    itxt = PngImagePlugin.PngInfo()
    itxt.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return [
        ("png", {"exif": exif}), ("jpg", {"exif": exif}), ("webp", {"exif": exif}),
        ("png", {"pnginfo": itxt}), ("jpg", {"xmp": xmp}), ("webp", {"xmp": xmp}),
        ("png", {}), ("jpg", {}), ("webp", {}),
    ]  # fmt: skip


def test_damaged_files_are_unreadable_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    transform = ImageTransformConfig(size=8)
    for extension, options in files(pixels):
        path = tmp_path / f"bad.{extension}"
        Image.fromarray(pixels).save(path, **options)
        content = path.read_bytes()
        load_picture(path, transform, 3)
        for damaged in (b"", b"garbage", content[: len(content) // 2], content[:40]):
            path.write_bytes(damaged)
            with pytest.raises(UnreadablePictureError) as caught:
                load_picture(path, transform, 3)
            assert "\n" not in str(caught.value)
            assert " at 0x" not in str(caught.value)  # an address would differ from run to run
        # Bytes turned at random, everywhere or where EXIF and XMP lie, decode or are listed; nothing else escapes.
        for end in (len(content), 200):
            for _ in range(60):
                noisy = bytearray(content)
                for place in rng.integers(0, end, 5):
                    noisy[place] ^= int(rng.integers(1, 256))
                path.write_bytes(repair_checksums(bytes(noisy)) if extension == "png" else bytes(noisy))
                with contextlib.suppress(UnreadablePictureError):
                    load_picture(path, transform, 3)


def repair_checksums(png: bytes) -> bytes:
    """Lets damage get past the first line of defence."""
    repaired, start = png[:8], 8
    while start + 12 <= len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4], "big")
        repaired += png[start:end] + zlib.crc32(png[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return repaired


def test_exif_that_cannot_be_written_again_does_no_harm(tmp_path: Path) -> None:
    """ImageOps.exif_transpose raises a TypeError here: it serialises a text with the type of a number."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    path = tmp_path / "x.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    content = path.read_bytes()
    # Orientation stays; the type of the resolution, a rational (5), becomes one that nobody knows.
    assert content.count(b"\x01\x1a\x00\x05") == 1
    path.write_bytes(content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"))
    turned = load_picture(path, ImageTransformConfig(size=8, filter="area"), 3).pixels
    assert turned[:, 5:].min() > 235


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = load(tmp_path / "x.png", Image.fromarray(pixels), 8, exif=exif)
    with Image.open(tmp_path / "x.png") as file:
        np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(file)))


@pytest.mark.parametrize("kind", ["lanczos", "area"])
@pytest.mark.parametrize(("width", "height"), [(90, 61), (40, 200), (33, 32), (12, 20)])
def test_the_square_is_that_of_resizing_first(tmp_path: Path, width: int, height: int, kind: str) -> None:
    """The textbook way: shorter side to the size, then the central crop. It differs by a fraction of a pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = load_picture(tmp_path / "x.png", ImageTransformConfig.model_validate({"size": 16, "filter": kind}), 1)
    scale = 16 / min(width, height)
    filters = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
    whole = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), filters[kind])
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    assert np.abs(found.pixels[..., 0] - expected).mean() < 8


def test_a_long_strip_takes_little_memory(tmp_path: Path) -> None:
    Image.new("L", (20_000, 1), 7).save(tmp_path / "x.png")
    code = (
        "import resource, sys; from pathlib import Path; from data_pipelines.images.transform import load_picture; "
        "from pomscale.config.schema import ImageTransformConfig; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "picture = load_picture(Path(sys.argv[1]), ImageTransformConfig(size=512), 1); "
        "assert (picture.pixels == 7).all(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 100_000


def test_other_formats_and_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("L", (4, 4)).save(path, "GIF")
    with pytest.raises(UnreadablePictureError, match="no PNG, JPEG or WebP picture"):
        load_picture(path, ImageTransformConfig(size=8), 1)
    with pytest.raises(PomscaleError, match=r"cannot read .*gone\.png"):
        load_picture(tmp_path / "gone.png", ImageTransformConfig(size=8), 1)
