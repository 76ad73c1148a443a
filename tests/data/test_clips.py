from __future__ import annotations

import contextlib
import errno
import importlib
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from pomscale.base.errors import InputError  # noqa: E402
from pomscale.media import UnreadableMediaError  # noqa: E402
from pomscale.media.clips import DecodedClip, decode_clip  # noqa: E402
from support.make_video import numbered_frame, read_number, write_video  # noqa: E402

TARGET = (16, 60, 96)  # one second at 16 fps


def decode(
    path: Path, targets: list[tuple[int, int, int]] | None = None, fps: float = 16, **kwargs: Any
) -> DecodedClip:
    with path.open("rb") as stream:
        return decode_clip(stream, targets or [TARGET], fps, kwargs.get("filter", "area"))


def numbered(count: int, height: int = 60, width: int = 96) -> list[np.ndarray]:
    return [numbered_frame(number, height, width) for number in range(count)]


def numbers(clip: DecodedClip) -> list[int]:
    return [read_number(frame) for frame in clip.frames]


def nearest(times: list[Fraction], fps: float, count: int) -> list[int]:
    """By brute force: the first of the source frames that are nearest to each time."""
    return [min(range(len(times)), key=lambda i, k=k: abs(times[i] - k / Fraction(fps))) for k in range(count)]


@pytest.mark.parametrize("rate", [5, 12, 16, 24, 25, Fraction(30000, 1001), 30, 60])
@pytest.mark.parametrize("fps", [8.0, 16.0, 23.976])
def test_every_frame_is_the_nearest_in_time(tmp_path: Path, rate: Fraction | int, fps: float) -> None:
    source = write_video(tmp_path / "x.mp4", numbered(int(3 * rate)), rate)
    clip = decode(source, [(32, 60, 96)], fps=max(fps, 16.0))
    times = [number / Fraction(rate) for number in range(int(3 * rate))]
    assert numbers(clip) == nearest(times, max(fps, 16.0), 32)
    assert not clip.info["variable_rate"]
    assert clip.info["source_fps"] == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("x.webm", "libvpx-vp9"), ("x.mkv", "libx264"), ("x.mov", "libx264"), ("x.ts", "libx264"), ("x.avi", "mpeg4")],
)
def test_other_containers(tmp_path: Path, name: str, codec: str) -> None:
    """Times are rounded in some, so a frame may be one that is nearest within that."""
    clip = decode(write_video(tmp_path / name, numbered(60), 25, codec=codec))
    errors = [abs(number / 25 - k / 16) for k, number in enumerate(numbers(clip))]
    assert max(errors) <= 0.5 / 25 + 1e-3
    assert not clip.info["variable_rate"]


@pytest.mark.parametrize("seed", range(4))
def test_variable_rates_are_followed_exactly(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ticks = np.cumsum(rng.integers(1, 12, 80)) + 70  # of 1/100 s; the clip does not start at zero
    times = [Fraction(int(tick), 100) for tick in ticks]
    clip = decode(write_video(tmp_path / "x.mp4", numbered(80), times=times), [(40, 60, 96)])
    assert numbers(clip) == nearest([time - times[0] for time in times], 16, 40)
    assert clip.info["variable_rate"]


def test_only_what_is_needed_is_decoded(tmp_path: Path) -> None:
    source = write_video(tmp_path / "x.mp4", numbered(300), 30)
    clip = decode(source)
    assert clip.frames.shape == (*TARGET, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.info == {
        "duration_s": 10.0,
        "width": 96,
        "height": 60,
        "source_fps": 30.0,
        "num_source_frames": 30,  # the last, 29 / 30 s, tells that 28 / 30 s is nearest to 15 / 16 s
        "num_dropped_frames": 0,
        "times": "frames",
        "variable_rate": False,
        "incomplete": None,
    }


@pytest.mark.parametrize(
    ("count", "rate", "fits"), [(124, 25, True), (123, 25, False), (149, Fraction(30000, 1001), True), (25, 5, True),
                                (24, 5, False), (80, 16, True), (79, 16, False)],
)  # fmt: skip
def test_how_long_a_clip_must_be(tmp_path: Path, count: int, rate: Fraction | int, fits: bool) -> None:
    """Five seconds, give or take half a source frame at the end."""
    source = write_video(tmp_path / "x.mp4", numbered(count), rate)
    if fits:
        assert len(decode(source, [(80, 60, 96)]).frames) == 80
        return
    told = rf"^has {count / rate:.2f} s; needs at least 5 s for 80 frames at 16 fps$"
    with pytest.raises(UnreadableMediaError, match=told):
        decode(source, [(80, 60, 96), (160, 60, 96)])


def test_the_longest_bucket_then_the_nearest_aspect_ratio(tmp_path: Path) -> None:
    wide = write_video(tmp_path / "wide.mp4", numbered(30, 60, 96), 30)
    tall = write_video(tmp_path / "tall.mp4", numbered(30, 96, 60), 30)
    targets = [(8, 40, 64), (16, 64, 40), (32, 40, 64), (16, 40, 64), (8, 48, 48)]
    assert (decode(wide, targets).target, decode(tall, targets).target) == (3, 1)
    assert decode(tall, [(32, 64, 40), (8, 40, 64), (1, 64, 40)]).target == 1  # length goes first
    clip = decode(wide, [(32, 40, 64), (12, 20, 20)])
    assert clip.frames.shape == (12, 20, 20, 3)
    assert numbers(clip) == nearest([Fraction(i, 30) for i in range(30)], 16, 12)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, -1, 1, 0), np.rot90),  # counterclockwise
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, 1, -1, 0), lambda x: np.rot90(x, 3)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    ],
)
def test_display_matrices_are_applied(tmp_path: Path, matrix: tuple[int, int, int, int], expected: Any) -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:16, :48] = 200
    pixels[16:, 80:] = 100
    upright = expected(pixels)
    source = write_video(tmp_path / "x.mp4", [pixels] * 16, 16, display_matrix=matrix, codec_options={"qp": "1"})
    targets = [(16, 32, 96), (16, 96, 32)]
    clip = decode(source, targets)
    assert targets[clip.target][1:] == upright.shape[:2]
    assert np.abs(clip.frames[8].astype(int) - upright).max() < 4
    assert (clip.info["width"], clip.info["height"]) == (96, 32)


def test_an_odd_angle_is_refused(tmp_path: Path) -> None:
    source = write_video(tmp_path / "x.mp4", numbered(16), 16, display_matrix=(1, 1, -1, 1))
    with pytest.raises(UnreadableMediaError, match="no multiple of 90 degrees"):
        decode(source)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """96x64 pixels, each twice as wide as high: shown as 192x64, the central square being a third of it."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    options = {"sample_aspect_ratio": Fraction(2), "codec_options": {"qp": "1"}}
    source = write_video(tmp_path / "x.mp4", [pixels] * 16, 16, **options)  # type: ignore[arg-type]
    targets = [(16, 64, 64), (16, 64, 192)]
    assert decode(source, targets).target == 1
    assert decode(source, targets[:1]).frames[:, :, 2:-2].min() > 250
    turned = write_video(tmp_path / "y.mp4", [pixels] * 16, 16, **options, display_matrix=(0, 1, 1, 0))  # type: ignore[arg-type]
    assert decode(turned, [(16, 192, 64), (16, 64, 192)]).target == 0
    assert decode(turned, targets[:1]).frames[:, 2:-2].min() > 250


def test_a_strip_is_refused(tmp_path: Path) -> None:
    source = write_video(tmp_path / "x.mp4", numbered(16, 16, 150), 16, sample_aspect_ratio=Fraction(2))
    with pytest.raises(UnreadableMediaError, match="is shown as 300x16: too narrow"):
        decode(source)


@pytest.mark.parametrize(("height", "width"), [(61, 97), (60, 300), (301, 96), (7, 11), (60, 96)])
@pytest.mark.parametrize("kind", ["area", "lanczos"])
def test_odd_sizes(tmp_path: Path, height: int, width: int, kind: str) -> None:
    pixels = np.broadcast_to(np.array([200, 120, 40], np.uint8), (height, width, 3))
    source = write_video(tmp_path / "x.mp4", [pixels] * 16, 16, pix_fmt="yuv444p", codec_options={"qp": "1"})
    for target in (TARGET, (16, 33, 17)):
        clip = decode(source, [target], filter=kind)
        assert clip.frames.shape == (*target, 3)
        assert np.abs(clip.frames.astype(int) - (200, 120, 40)).max() <= 2


def yuv_frame(rgb: np.ndarray, red: float, blue: float, full_range: bool) -> Any:
    """A planar YUV 4:4:4 frame by the definition: `red` and `blue` are the shares of luma."""
    r, g, b = np.moveaxis(rgb / 255.0, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    scales = [(255, 0), (255, 128), (255, 128)] if full_range else [(219, 16), (224, 128), (224, 128)]
    codes = [
        (plane * scale + offset).round().clip(0, 255).astype(np.uint8)
        for plane, (scale, offset) in zip(planes, scales, strict=True)
    ]
    return av.VideoFrame.from_ndarray(np.stack(codes), format="yuv444p")


@pytest.mark.parametrize(("space", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_those_of_the_tags(tmp_path: Path, space: int, red: float, blue: float, full_range: bool) -> None:
    """Tags of BT.709, BT.601 and BT.2020, as FFmpeg numbers them."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)], np.uint8)
    pixels = np.broadcast_to(colours.repeat(16, 0), (32, 96, 3))
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1 + full_range
        for number in range(16):
            frame = yuv_frame(pixels, red, blue, full_range)
            frame.colorspace, frame.color_range = space, 1 + full_range
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = decode(tmp_path / "x.mp4", [(16, 32, 96)]).frames[8, 16, 8::16]
    assert np.abs(found.astype(int) - colours).max() <= 3


def area_mean(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean over the area that each new pixel covers, in float64."""

    def weights(old: int, new: int) -> np.ndarray:
        edges = np.linspace(0, old, new + 1)[:, None]
        overlap = np.minimum(edges[1:], np.arange(old) + 1) - np.maximum(edges[:-1], np.arange(old))
        return overlap.clip(0) * new / old

    return np.einsum("yh,hwc,xw->yxc", weights(len(pixels), height), pixels, weights(pixels.shape[1], width))


@pytest.mark.parametrize(("height", "width"), [(100, 160), (60, 96), (130, 208)])
def test_area_is_the_exact_mean(tmp_path: Path, height: int, width: int) -> None:
    """Without bias: swscale's fast mode is 2 levels too dark here. Grey, as colour planes have a size of their own."""
    grey = np.random.default_rng(0).integers(20, 236, (height, width, 1)).repeat(3, 2).astype(np.uint8)
    source = write_video(tmp_path / "x.mkv", [grey] * 16, 16, codec_options={"qp": "0"})
    with av.open(str(source)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:height, :, None].astype(float)
    expected = area_mean((luma - 16) * 255 / 219, *TARGET[1:])
    errors = decode(source).frames[0].mean(-1) - expected[..., 0]
    assert np.abs(errors).max() < 0.75
    assert abs(errors.mean()) < 0.05


def test_what_is_no_video_is_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = write_video(tmp_path / "x.mp4", numbered(32), 16).read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux([*sound.encode(frame), *sound.encode(None)])
    unreadable = {
        "no video that can be read": [b"", b"garbage" * 100, whole[: len(whole) // 2], b"#EXTM3U\n#EXTINF:5,\nx.mp4\n"],
        "has no video stream": [(tmp_path / "sound.mp4").read_bytes()],
    }
    for told, contents in unreadable.items():
        for content in contents:
            with pytest.raises(UnreadableMediaError, match=told) as caught:
                decode_clip(io.BytesIO(content), [TARGET], 16, "area")
            assert "\n" not in str(caught.value)
            assert " at 0x" not in str(caught.value)  # an address would differ from run to run
    assert capfd.readouterr() == ("", "")


def test_damage_in_the_middle_leaves_what_precedes_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = [frame // 2 + rng.integers(0, 100, frame.shape, np.uint8) for frame in numbered(64)]
    for name in ("x.mp4", "x.mkv"):
        source = write_video(tmp_path / name, noisy, 16, codec_options={"bf": "0", "g": "8"})
        content = bytearray(source.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 3000] = bytes(3000)
        source.write_bytes(content)
        clip = decode(source)
        assert numbers(clip) == list(range(16))
        with pytest.raises(UnreadableMediaError, match=r"^has [12]\.\d\d s of 4.00 s, then .*; needs at least 4 s"):
            decode(source, [(64, 60, 96)])


def test_damage_anywhere_is_an_unreadable_clip_or_a_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, codec in (("x.mp4", "libx264"), ("x.webm", "libvpx-vp9"), ("x.avi", "mpeg4")):
        content = write_video(tmp_path / name, numbered(17, 32, 48), 16, codec=codec).read_bytes()
        for end in (len(content), 300):
            for _ in range(40):
                damaged = bytearray(content)
                for place in rng.integers(0, end, 5):
                    damaged[place] ^= int(rng.integers(1, 256))
                with contextlib.suppress(UnreadableMediaError):
                    assert decode_clip(io.BytesIO(damaged), [TARGET], 16, "area").frames.shape == (*TARGET, 3)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_failing_disk_says_nothing_about_the_clip(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (60, 96, 3), np.uint8) for _ in range(64)]
    content = write_video(tmp_path / name, frames, 16).read_bytes()

    class FailingDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if len(content) // 3 < self.tell() < len(content) // 2:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error") as caught:
        decode_clip(FailingDisk(content), [(64, 60, 96)], 16, "area")
    assert not isinstance(caught.value, av.FFmpegError)


def test_many_threads_decode_what_one_does(tmp_path: Path) -> None:
    sources = [write_video(tmp_path / f"{i}.mp4", numbered(40 + i), 20 + i) for i in range(6)]
    alone = [decode(source).frames for source in sources]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda source: decode(source).frames, sources * 4))
    for i, frames in enumerate(together):
        np.testing.assert_array_equal(frames, alone[i % 6])


def test_without_pyav_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clips", "clip_frames", "frame_fitter", "pyav"):
        monkeypatch.delitem(sys.modules, f"pomscale.media.{name}")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"clips need the package av: .*pip install -e '\.\[video\]'"):
        importlib.import_module("pomscale.media.clips")
