from __future__ import annotations

import contextlib
import errno
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pomscale.media import Filter, UnreadableMediaError, nearest_bucket, pictures
from pomscale.media.pictures import DecodedPicture, decode_picture, fit_picture


def decode(path: Path, channels: int = 3) -> DecodedPicture:
    with path.open("rb") as stream:
        return decode_picture(stream, channels)


def load(path: Path, image: Image.Image, size: int, channels: int = 3, **save: object) -> np.ndarray:
    image.save(path, **save)
    return fit_picture(decode(path, channels).image, (size, size), "area")


@pytest.mark.parametrize(("width", "height"), [(8, 8), (31, 8), (8, 31), (5, 3), (100, 99), (1, 1), (1000, 3)])
@pytest.mark.parametrize("kind", ["lanczos", "area"])
@pytest.mark.parametrize("target", [(8, 8), (6, 10), (9, 4)])
def test_any_size_becomes_the_target(
    tmp_path: Path, width: int, height: int, kind: Filter, target: tuple[int, int]
) -> None:
    Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / "x.png")
    picture = decode(tmp_path / "x.png")
    assert (picture.width, picture.height) == (width, height)
    pixels = fit_picture(picture.image, target, kind)
    assert pixels.shape == (*target, 3)
    assert (pixels == (10, 20, 30)).all()


def test_pictures_of_the_right_size_are_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    np.testing.assert_array_equal(load(tmp_path / "x.png", Image.fromarray(pixels), 8, 1)[..., 0], pixels)


@pytest.mark.parametrize("kind", ["lanczos", "area"])
@pytest.mark.parametrize(("shape", "target"), [((20, 31), (20, 24)), ((33, 16), (28, 16)), ((17, 17), (17, 17))])
def test_what_only_has_to_be_cut_is_not_resampled(
    shape: tuple[int, int], target: tuple[int, int], kind: Filter
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    top, left = (shape[0] - target[0]) // 2, (shape[1] - target[1]) // 2
    expected = pixels[top : top + target[0], left : left + target[1]]
    np.testing.assert_array_equal(fit_picture(Image.fromarray(pixels), target, kind)[..., 0], expected)


def test_the_nearest_bucket() -> None:
    buckets = [(256, 256), (192, 320), (320, 192), (512, 512), (512, 512)]
    assert nearest_bucket((1000, 1000), buckets) == 3  # the larger square, and the first of two
    assert nearest_bucket((1080, 1920), buckets) == 1
    assert nearest_bucket((1920, 1080), buckets) == 2
    # 1:2 is as far from 1:1 as 2:1 is, in whatever order and size.
    assert nearest_bucket((10, 10), [(14, 28), (28, 14), (20, 20)]) == 2
    assert nearest_bucket((10, 10), [(14, 28), (28, 14)]) == 0
    assert nearest_bucket((300, 300), [(28, 14), (15, 30)]) == 1
    assert nearest_bucket((9, 16), [(80, 240, 384), (80, 384, 240)]) == 0  # only height and width count


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
    with pytest.raises(UnreadableMediaError, match="more than 8 bits"):
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
    for extension, options in files(pixels):
        path = tmp_path / f"bad.{extension}"
        Image.fromarray(pixels).save(path, **options)
        content = path.read_bytes()
        decode(path)
        for damaged in (b"", b"garbage", content[: len(content) // 2], content[:40]):
            path.write_bytes(damaged)
            with pytest.raises(UnreadableMediaError) as caught:
                decode(path)
            assert "\n" not in str(caught.value)
            assert " at 0x" not in str(caught.value)  # an address would differ from run to run
        # Bytes turned at random, everywhere or where EXIF and XMP lie, decode or are listed; nothing else escapes.
        for end in (len(content), 200):
            for _ in range(60):
                noisy = bytearray(content)
                for place in rng.integers(0, end, 5):
                    noisy[place] ^= int(rng.integers(1, 256))
                path.write_bytes(repair_checksums(bytes(noisy)) if extension == "png" else bytes(noisy))
                with contextlib.suppress(UnreadableMediaError):
                    decode(path)


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
    turned = np.asarray(decode(path).image)
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
def test_the_square_is_that_of_resizing_first(width: int, height: int, kind: Filter) -> None:
    """The textbook way: shorter side to the size, then the central crop. It differs by a fraction of a pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)).astype(np.uint8)
    found = fit_picture(Image.fromarray(pixels), (16, 16), kind)
    scale = 16 / min(width, height)
    filters = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
    whole = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), filters[kind])
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    assert np.abs(found[..., 0] - expected).mean() < 8


def test_a_long_strip_takes_little_memory(tmp_path: Path) -> None:
    Image.new("L", (20_000, 1), 7).save(tmp_path / "x.png")
    code = (
        "import resource, sys; from pomscale.media.pictures import decode_picture, fit_picture; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "picture = decode_picture(open(sys.argv[1], 'rb'), 1); "
        "assert (fit_picture(picture.image, (512, 512), 'lanczos') == 7).all(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 100_000


def test_other_formats_are_told_apart_from_damage(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png", "GIF")
    with pytest.raises(UnreadableMediaError, match="no PNG, JPEG or WebP picture"):
        decode(tmp_path / "x.png")


def test_a_file_too_large_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 2**20)
    with (tmp_path / "x.png").open("wb+") as stream:
        stream.truncate(2**21)
        with pytest.raises(UnreadableMediaError, match="more than 1 MiB"):
            decode_picture(stream, 3)
        assert stream.tell() == 2**20 + 1


def test_a_picture_of_200_megapixels_is_told_with_the_remedy() -> None:
    """Its header is enough, as of a bomb: a file of a few bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(
        UnreadableMediaError, match=r"has more than 179 megapixels.* smaller first, .*magick OLD -resize"
    ):
        decode_picture(io.BytesIO(content), 3)


def test_a_failing_disk_says_nothing_about_the_picture() -> None:
    class FailingDisk(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        decode_picture(FailingDisk(), 3)  # type: ignore[arg-type]
