"""Time ranges of one video file, in one pass: against brute force, and to the bit as each is decoded by itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from pomscale.media import UnreadableMediaError, clip_frames, clips  # noqa: E402
from pomscale.media.clips import DecodedClip, Span, decode_clip, decode_spans  # noqa: E402
from pomscale.media.frame_fitter import FrameFitter  # noqa: E402
from support.make_video import numbered_frame, write_video  # noqa: E402

RATE, FPS = 25, 10
TARGETS = [(20, 34, 54), (5, 34, 54)]  # two seconds, half a second
SIZE = (61, 97)

NO_B_FRAMES = {"bf": "0", "g": "40", "keyint_min": "40", "sc_threshold": "0"}
B_FRAMES = {"bf": "3", "b_strategy": "0", "g": "40", "keyint_min": "40", "sc_threshold": "0"}
SEQUENCES: dict[str, dict[str, Any]] = {
    "no reordering": {"codec_options": NO_B_FRAMES},
    "reordered": {"codec_options": B_FRAMES},
    "open groups": {"codec_options": {**B_FRAMES, "x264-params": "open-gop=1:keyint=40:bframes=3:b-adapt=0"}},
    "one key frame": {"codec_options": {**B_FRAMES, "g": "1000"}},
    "every frame a key frame": {"codec_options": {"g": "1", "bf": "0"}},
    "variable rate": {"codec_options": B_FRAMES, "times": "variable"},
    "starts late": {"codec_options": B_FRAMES, "times": "late"},
    "Matroska": {"codec_options": B_FRAMES, "name": "x.mkv"},
    "transport stream": {"codec_options": B_FRAMES, "name": "x.ts"},
    "MPEG-4": {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "40"}, "pix_fmt": "yuv420p", "size": (60, 96)},
    "VP9": {
        "codec": "libvpx-vp9", "codec_options": {"g": "40", "deadline": "realtime", "cpu-used": "8"}, "name": "x.webm",
    },
    "refreshed row by row": {"codec_options": {"x264-params": "intra-refresh=1:keyint=40:bframes=0"}},
    "AVI": {"codec": "mpeg4", "codec_options": {"g": "40"}, "name": "x.avi", "pix_fmt": "yuv420p", "size": (60, 96)},
    "AVI, reordered": {
        "codec": "mpeg4", "codec_options": {"bf": "2", "g": "40"}, "name": "x.avi", "pix_fmt": "yuv420p",
        "size": (60, 96),
    },
}  # fmt: skip

SPANS = {
    "apart, between key frames": [(0.5, 1.3), (3.3, 5.5), (7.0, 7.6)],
    "one after the other": [(0, 2), (2, 4), (4, 6), (6, 8)],
    "overlapping": [(1, 4), (1.5, 2.5), (2, 6), (3.98, 7), (3.98, 4.6)],
    "equal": [(4.2, 6.4)] * 3,
    "in no order": [(4, 6), (1, 3), (5, 7), (0, 2), (0, 2.2)],
    "late alone": [(7.13, 9.2)],
    "at the end": [(6.9, 8.93), (7.9, 9.999), (9.48, 10)],
}


def write(tmp_path: Path, kind: str, count: int = 250) -> Path:
    options = {"pix_fmt": "yuv444p", "name": "x.mp4", "size": SIZE, **SEQUENCES[kind]}
    name, size, times = options.pop("name"), options.pop("size"), options.pop("times", None)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (count, *size, 3), dtype=np.uint8)
    frames = [numbered_frame(number, *size) // 2 + noise[number] for number in range(count)]
    if times == "variable":
        options["times"] = [Fraction(int(tick), 100) for tick in np.cumsum(rng.integers(1, 9, count))]
    elif times == "late":
        options["times"] = [Fraction(70 + 4 * number, 100) for number in range(count)]
    return write_video(tmp_path / name, frames, RATE, **options)


def spans_of(pairs: list[tuple[float, float]]) -> list[Span]:
    return [Span(Fraction(str(start)), Fraction(str(end))) for start, end in pairs]


def decode(path: Path, spans: list[Span], **options: Any) -> list[DecodedClip | UnreadableMediaError]:
    with path.open("rb") as stream:
        return list(decode_spans(stream, spans, options.pop("targets", TARGETS), FPS, "area", **options))


def assert_same(one: list[DecodedClip | UnreadableMediaError], other: list[DecodedClip | UnreadableMediaError]) -> None:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, UnreadableMediaError) or isinstance(b, UnreadableMediaError):
            assert str(a) == str(b)
        else:
            assert (a.info, a.target, a.shown) == (b.info, b.target, b.shown)
            assert np.array_equal(a.frames, b.frames)


def naive(path: Path, span: Span, count: int) -> np.ndarray:
    """Decode all of the file, then take the nearest frame to each time, by brute force."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base - frames[0].pts * frames[0].time_base for frame in frames]
    fitter = FrameFitter(frames[0], Fraction(1), "area", 3)
    shown = [i for i, time in enumerate(times) if span.end is None or time < span.end]
    chosen = [min(shown, key=lambda i, k=k: abs(times[i] - span.start - Fraction(k, FPS))) for k in range(count)]
    return np.stack([fitter.fit(frames[i], TARGETS[0][1:]) for i in chosen])


@pytest.mark.parametrize("kind", [kind for kind in SEQUENCES if kind != "AVI, reordered"])
def test_every_part_has_the_nearest_frames_in_one_pass_and_alone(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    for pairs in SPANS.values():
        spans = spans_of(pairs)
        together = decode(path, spans)
        assert_same(together, [clip for span in spans for clip in decode(path, [span])])
        for span, clip in zip(spans, together, strict=True):
            assert isinstance(clip, DecodedClip), (kind, span, clip)
            assert np.array_equal(clip.frames, naive(path, span, len(clip.frames))), (kind, span)
            assert clip.info["range_s"] == [float(span.start), float(span.end or 0)]


def test_times_that_are_of_no_use_are_told_in_every_part(tmp_path: Path) -> None:
    path = write(tmp_path, "AVI, reordered")
    for pairs in SPANS.values():
        spans = spans_of(pairs)
        together = decode(path, spans)
        assert_same(together, [clip for span in spans for clip in decode(path, [span])])
        assert all(isinstance(clip, DecodedClip) and clip.info["times"] == "even" for clip in together)


def test_the_whole_file_is_a_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "reordered", 60)
    with path.open("rb") as stream:
        whole = decode_clip(stream, TARGETS, FPS, "area")
    (part,) = decode(path, spans_of([(0, 2.4)]))
    assert isinstance(part, DecodedClip)
    assert np.array_equal(whole.frames, part.frames)
    assert {**whole.info, "range_s": [0.0, 2.4]} == part.info


@pytest.fixture
def num_decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the frames that readers give."""
    count = 0
    timed = clip_frames.FrameReader.timed

    def counted(reader: clip_frames.FrameReader) -> Iterator[clip_frames.Shown]:
        nonlocal count
        for shown in timed(reader):
            count += 1
            yield shown

    monkeypatch.setattr(clip_frames.FrameReader, "timed", counted)
    return lambda: count


def test_each_frame_is_decoded_once_and_none_of_a_gap(tmp_path: Path, num_decoded: Callable[[], int]) -> None:
    path = write(tmp_path, "reordered")
    decode(path, spans_of([(0, 2), (0.5, 2.5), (2, 4), (2, 4)]))
    assert num_decoded() <= 102
    before = num_decoded()
    decode(path, spans_of([(8.2, 8.8)]))  # the key frame is at 8 s
    assert num_decoded() - before <= 2 + 21
    before = num_decoded()
    decode(path, spans_of([(0, 0.6), (8.2, 8.8)]))
    assert num_decoded() - before <= 17 + 2 + 21


def test_more_parts_overlap_than_are_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_decoded: Callable[[], int]
) -> None:
    path = write(tmp_path, "reordered")
    spans = spans_of([(1, 3), (1, 2), (1.5, 4), (1.6, 4), (1.7, 3), (2, 5), (6, 8)])
    together = decode(path, spans)
    num_once = num_decoded()
    monkeypatch.setattr(clips, "_MAX_OPEN", 2)
    assert_same(decode(path, spans), together)
    assert num_once < num_decoded() - num_once < 4 * num_once


def damaged(path: Path, frame: int) -> bytes:
    """The file with the bytes of a frame's packet overwritten."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = min(packets, key=lambda packet: abs(packet.pts * packet.time_base - Fraction(frame, RATE)))
    begin = content.find(bytes(packet))
    content[begin : begin + packet.size] = b"\xff" * packet.size
    return bytes(content)


@pytest.mark.parametrize(
    ("kind", "frame"),
    [("reordered", 3), ("reordered", 90), ("no reordering", 120), ("MPEG-4", 131), ("reordered", 131)],
)
def test_damage_concerns_the_parts_that_have_it_alone(tmp_path: Path, kind: str, frame: int) -> None:
    path = write(tmp_path, kind)
    path.write_bytes(damaged(path, frame))
    for keep in (False, True):
        for pairs in SPANS.values():
            spans = spans_of(pairs)
            together = decode(path, spans, keep_incomplete=keep)
            assert_same(together, [clip for span in spans for clip in decode(path, [span], keep_incomplete=keep)])
            for span, clip in zip(spans, together, strict=True):
                if frame > 3 and (span.end or 0) < Fraction(frame - 8, RATE):
                    assert isinstance(clip, DecodedClip), (span, clip)


def test_parts_beyond_the_end_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "reordered", 100)
    spans = spans_of([(0, 2), (1.9, 3.9), (2.5, 4.5), (3.9, 4.9), (4, 6), (100, 102)])
    first, second, *beyond = decode(path, spans)
    assert isinstance(first, DecodedClip)
    assert isinstance(second, DecodedClip)
    assert [str(error) for error in beyond] == [
        "has 1.50 s of its range, 2.50 s to 4.50 s, then the video's end (QuickTime / MOV); replace the file, correct "
        "the range, or keep such clips as shorter ones: transform.incomplete: keep",
        "has 0.10 s of its range, 3.90 s to 4.90 s, then the video's end (QuickTime / MOV); needs at least 0.5 s for 5 "
        "frames at 10 fps",
        "its range, 4.00 s to 6.00 s, begins beyond the video's end at 4.00 s",
        "its range, 100.00 s to 102.00 s, begins beyond the video's end at 4.00 s",
    ]
    kept = decode(path, spans, keep_incomplete=True)[2]
    assert isinstance(kept, DecodedClip)
    assert len(kept.frames) == 5
    assert kept.info["incomplete"].startswith("1.50 s of its range")


def test_a_part_that_is_too_short_for_any_target(tmp_path: Path) -> None:
    (error,) = decode(write(tmp_path, "reordered", 100), spans_of([(1, 1.3)]))
    assert str(error) == "has 0.30 s; needs at least 0.5 s for 5 frames at 10 fps"


@pytest.mark.parametrize("content", [b"", b"no video" * 100])
def test_no_video_is_told_in_every_part(content: bytes) -> None:
    found = list(decode_spans(io.BytesIO(content), spans_of([(0, 1), (1, 2)]), TARGETS, FPS, "area"))
    assert len(found) == 2
    assert all(isinstance(error, UnreadableMediaError) and "no video" in str(error) for error in found)
