"""The right frame at every time: container x codec x reordering x fault, against numbers that the frames show."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from pomscale.media import UnreadableMediaError  # noqa: E402
from pomscale.media.clips import DecodedClip, decode_clip  # noqa: E402
from support.make_video import numbered_frame, read_number, write_video  # noqa: E402

RATE, FPS, COUNT = 12, 10, 48  # no time of a result lies in the middle between two frames
TICK = Fraction(1, RATE)
LONG, SHORT = (30, 60, 96), (5, 60, 96)  # 3 s and half a second
EQUAL = 7  # the frame that gets the time of the one before it

Arrange = Callable[[list[Any]], list[Any]]


# -- packets as other programs write them ------------------------------------------------------------------------------


def as_they_are(packets: list[Any]) -> list[Any]:
    return packets


def copied_without_times(packets: list[Any]) -> list[Any]:
    """As `ffmpeg -c copy` from an AVI does: packets in the order of decoding, with the times of decoding."""
    for number, packet in enumerate(packets):
        packet.pts = packet.dts = number
        packet.time_base = TICK
    return packets


def packed(packets: list[Any]) -> list[Any]:
    """As XviD and DivX write for AVI: a B-frame in the packet of the frame before it, and a placeholder after it."""
    contents = [bytes(packet) for packet in packets]
    types = [content[content.find(b"\0\0\1\xb6") + 4] >> 6 for content in contents]  # 2: a B-frame
    joined: list[tuple[bytes, bool]] = []
    for number, content in enumerate(contents):
        if types[number] == 2:
            joined[-1] = joined[-1][0] + content, joined[-1][1]
            joined.append((b"\0\0\1\xb6\x50\0\x7f", False))
        else:
            joined.append((content, packets[number].is_keyframe))
    joined[0] = b"\0\0\1\xb2DivX503b1393p" + joined[0][0], True
    made = []
    for content, is_key in joined:
        packet = av.Packet(content)
        packet.is_keyframe, packet.duration = is_key, 1
        made.append(packet)
    return copied_without_times(made)


def with_an_equal_time(packets: list[Any]) -> list[Any]:
    """One frame gets the time of the one before it. Times of decoding lie before both, so any container takes that."""
    times = sorted(packet.pts for packet in packets)
    for packet in packets:
        packet.dts -= 3 * (times[1] - times[0])
        if packet.pts == times[EQUAL]:
            packet.pts = times[EQUAL - 1]
    return packets


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file. `times` is where those of its frames come from."""

    extension: str
    codec: str
    num_b_frames: int = 0
    arrange: Arrange = as_they_are
    times: str = "frames"

    def __str__(self) -> str:
        how = "" if self.arrange is as_they_are else f"-{self.arrange.__name__}"
        return f"{self.extension}-{self.codec}-{self.num_b_frames}{how}"

    def write(self, path: Path, **changes: Any) -> Path:
        options = {"bf": str(self.num_b_frames), "g": "12", "preset": "veryfast"}
        if self.codec == "libx265":
            options |= {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
        if self.codec.startswith("libvpx"):
            options = {"g": "12", "deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "1M"}
        if self.codec in ("mpeg4", "mjpeg"):
            options = {"bf": str(self.num_b_frames), "g": "12", "b": "4M"}
        frames = [numbered_frame(number, 60, 96) for number in range(COUNT)]
        # AVI has one time base, that of its rate; the others can tell times as fine as these.
        time_base = TICK if self.arrange in (copied_without_times, packed) or self.extension == "avi" else TICK / 100
        movflags = {"movflags": "faststart"} if self.extension in ("mp4", "mov") else {}
        values: dict[str, Any] = {
            "codec": self.codec, "codec_options": options, "arrange": self.arrange, "time_base": time_base,
            "container_options": movflags, "pix_fmt": "yuvj420p" if self.codec == "mjpeg" else "yuv420p",
        }  # fmt: skip
        return write_video(path / f"x.{self.extension}", changes.pop("frames", frames), RATE, **values | changes)


H264 = [Kind(extension, "libx264", bf) for extension in ("mp4", "mov", "mkv", "ts") for bf in (0, 2)]
OTHERS = [Kind("mp4", "libx265", 2), Kind("webm", "libvpx-vp9"), Kind("webm", "libvpx"), Kind("mp4", "mpeg4", 1)]
AVI = [Kind("avi", codec) for codec in ("libx264", "mpeg4", "mjpeg")]
STRAY = [
    *(Kind("avi", "libx264", bf, times="even") for bf in (1, 2, 16)),
    Kind("avi", "mpeg4", 1, times="even"),
    *(Kind(e, "libx264", 2, copied_without_times, times="even") for e in ("mp4", "mkv")),
    *(Kind(e, "mpeg4", 1, packed, times="even") for e in ("avi", "mp4", "mkv")),
]


def decode(
    content: bytes, targets: tuple[tuple[int, int, int], ...] = (LONG, SHORT), fps: float = FPS, keep: bool = False
) -> DecodedClip:
    return decode_clip(io.BytesIO(content), targets, fps, "area", keep_incomplete=keep)


def numbers(clip: DecodedClip) -> list[int]:
    return [read_number(frame) for frame in clip.frames]


def nearest(times: dict[int, Fraction], count: int, fps: float = FPS) -> list[int]:
    """By brute force: the frame that is nearest to each time, the earlier of two. `times` by the frame's number."""
    start = min(times.values())
    ordered = sorted(times, key=times.__getitem__)
    return [min(ordered, key=lambda n, k=k: abs(times[n] - start - k / Fraction(fps))) for k in range(count)]


EVEN = {number: number * TICK for number in range(COUNT)}
_GAPS = np.random.default_rng(0).integers(1, 4, COUNT)
UNEVEN = {number: int(ticks) * TICK for number, ticks in enumerate(np.cumsum(_GAPS) - _GAPS[0])}


@pytest.mark.parametrize("kind", [*H264, *OTHERS, *AVI, *STRAY], ids=str)
def test_clean(tmp_path: Path, kind: Kind) -> None:
    content = kind.write(tmp_path).read_bytes()
    clip = decode(content)
    assert numbers(clip) == nearest(EVEN, 30)
    found = {name: clip.info[name] for name in ("times", "incomplete", "num_dropped_frames", "variable_rate")}
    assert found == {"times": kind.times, "incomplete": None, "num_dropped_frames": 0, "variable_rate": False}
    # All of it, at its own rate; and so little that the times have not gone back by then.
    assert numbers(decode(content, ((COUNT, 60, 96),), RATE)) == list(range(COUNT))
    for count in (1, 2, 3):
        assert numbers(decode(content, ((count, 60, 96),), RATE)) == list(range(count))


@pytest.mark.parametrize("kind", [*H264, *OTHERS], ids=str)
def test_two_frames_with_one_time(tmp_path: Path, kind: Kind) -> None:
    """The second is left out, and the clip goes on. AVI tells no such times."""
    clip = decode(kind.write(tmp_path, arrange=with_an_equal_time).read_bytes())
    assert numbers(clip) == nearest({number: time for number, time in EVEN.items() if number != EQUAL}, 30)
    assert (clip.info["num_dropped_frames"], clip.info["incomplete"]) == (1, None)


@pytest.mark.parametrize("kind", [*H264, *OTHERS, *AVI, *STRAY], ids=str)
def test_a_file_that_was_cut_off(tmp_path: Path, kind: Kind) -> None:
    """Never a shorter clip without a trace, where the file states its length at all."""
    rng = np.random.default_rng(0)
    noisy = [numbered_frame(n, 60, 96) // 2 + rng.integers(0, 100, (60, 96, 3), np.uint8) for n in range(COUNT)]
    content = kind.write(tmp_path, frames=noisy).read_bytes()
    assert decode(content).info["incomplete"] is None
    cut = content[: len(content) // 2]
    # MPEG-TS states no length, so this is the time of the last packet; here that is damaged.
    told = r"^has [0-2]\.\d\d s of [24]\.0\d s, then (the end of the file|damage|a damaged frame).* \(.*\); replace the"
    with pytest.raises(UnreadableMediaError, match=rf"{told} file, or .*transform\.incomplete: keep$"):
        decode(cut)
    kept = decode(cut, keep=True)
    assert (kept.target, numbers(kept)) == (1, nearest(EVEN, 5))
    assert re.match(r"[0-2]\.\d\d s of [24]\.0\d s, then ", kept.info["incomplete"])
    # What is needed is there.
    assert decode(cut, (SHORT,)).info["incomplete"] is None
    with pytest.raises(UnreadableMediaError, match=r" s of [24]\.0.*\); needs at least 3 s for 30 frames at 10 fps$"):
        decode(cut, (LONG,), keep=True)


@pytest.mark.parametrize("kind", [*H264, *OTHERS], ids=str)
def test_times_that_begin_below_zero(tmp_path: Path, kind: Kind) -> None:
    """An mp4 shows what lies at 0 and later (by its edit list); the others begin with the first frame."""
    times = [(number - 6) * TICK for number in range(COUNT)]
    clip = decode(kind.write(tmp_path, times=times).read_bytes())
    first = 6 if kind.extension in ("mp4", "mov") else 0
    assert numbers(clip) == nearest({number: time for number, time in EVEN.items() if number >= first}, 30)


@pytest.mark.parametrize("kind", [*H264, *OTHERS], ids=str)
def test_a_variable_rate(tmp_path: Path, kind: Kind) -> None:
    clip = decode(kind.write(tmp_path, times=list(UNEVEN.values())).read_bytes())
    assert numbers(clip) == nearest(UNEVEN, 30)
    assert clip.info["variable_rate"]


@pytest.mark.parametrize("kind", [*AVI, Kind("avi", "libx264", 2), Kind("avi", "mpeg4", 1)], ids=str)
def test_a_variable_rate_in_avi(tmp_path: Path, kind: Kind) -> None:
    """Empty packets are the gaps. With reordered frames nothing tells which frame lies beside one."""
    content = kind.write(tmp_path, times=list(UNEVEN.values())).read_bytes()
    if kind.num_b_frames == 0:
        assert numbers(decode(content)) == nearest(UNEVEN, 30)
        return
    told = r"^is AVI .* with reordered frames, .* and its packets are not evenly spaced, .*ffmpeg -i OLD NEW"
    for keep in (False, True):  # it is no clip that ends early
        with pytest.raises(UnreadableMediaError, match=told):
            decode(content, keep=keep)


@pytest.mark.parametrize("kind", [kind for kind in [*H264, *OTHERS] if kind.extension in ("mp4", "mov")], ids=str)
@pytest.mark.parametrize(("first", "seconds"), [(17, None), (17, 1), (0, 2)])
def test_an_edit_list(tmp_path: Path, kind: Kind, first: int, seconds: int | None) -> None:
    """It shows the frames from `first` on, for some seconds: a whole clip of that length."""
    content = bytearray(kind.write(tmp_path, time_base=Fraction(1, 12288)).read_bytes())
    place = content.find(b"elst") + 12
    duration, media_time = struct.unpack_from(">Ii", content, place)
    scale = duration // 4
    length = duration - round(first * TICK * scale) if seconds is None else seconds * scale
    struct.pack_into(">Ii", content, place, length, media_time + first * 1024)
    clip = decode(bytes(content), (LONG, (10, 60, 96)))
    shown = {n: t for n, t in EVEN.items() if n >= first and (seconds is None or t < first * TICK + seconds)}
    count = 30 if len(shown) * TICK >= 3 else 10
    assert numbers(clip) == nearest(shown, count)
    assert clip.info["incomplete"] is None


def test_a_file_that_states_no_length_does_not_tell_a_cut(tmp_path: Path) -> None:
    """The limit of what can be known: a live WebM that ends between two packets is a whole one."""
    content = Kind("webm", "libvpx-vp9").write(tmp_path, container_options={"live": "1"}).read_bytes()
    clip = decode(content[: len(content) // 2])
    assert (clip.target, clip.info["duration_s"], clip.info["incomplete"]) == (1, None, None)


def test_sound_that_is_longer_than_the_pictures_is_no_cut(tmp_path: Path) -> None:
    """Matroska may state the length of all streams alone, that of the sound here."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=RATE), container.add_stream("aac", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 96, 60, "yuv420p"
        for number in range(30):  # 2.5 s
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 60, 96), format="rgb24")
            frame.pts, frame.time_base = number, TICK
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        for number in range(32):  # 4.1 s
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts, silence.time_base = 8000, 1024 * number, Fraction(1, 8000)
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    content = path.read_bytes().replace(b"DURATION", b"EXPIRATI")  # tags of each stream, which not all programs write
    clip = decode(content)
    assert (clip.target, clip.info["incomplete"]) == (1, None)
    assert clip.info["duration_s"] > 4
    with pytest.raises(UnreadableMediaError, match="then the end of the file"):
        decode(content[: len(content) * 2 // 3])
