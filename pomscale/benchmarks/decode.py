"""The part of `pomscale bench encode` that decodes clips: ranges of a long file, and files on two cores.

- Ranges: clips of 150 frames in one file of 640x400 with a key frame every 250 frames, in one pass, against a seek to
  each. Both scale the same frames in one thread; the results must be equal to the bit. Their rates are those per
  second of the processor, which others on the machine change least.
- Files: 80 frames of 240x384 from files of 640x400, by two threads as an encode has them, against the plainest PyAV
  loop with its default threads. The loop's scaler is another one, whose greys are some levels off; so every frame must
  be nearer to the loop's frame of its number than to those before and after.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from pomscale.base.errors import PomscaleError
from pomscale.benchmarks.report import BenchReport
from pomscale.media.clips import DecodedClip, Span, decode_clip, decode_spans
from pomscale.media.frame_fitter import FrameFitter
from pomscale.media.pyav import av

_HEIGHT, _WIDTH = 400, 640
_TARGET = (80, 240, 384)
_FPS = 16
_SOURCE_FPS = 30
_KEY_FRAMES = 250
_CLIP_FRAMES = 150  # the five seconds of the target

# Deviation of the grain, which makes files of about a megabit per second, as films of this size have.
_GRAIN = 7.0

Frames = list[np.ndarray]


def bench_decode(report: BenchReport, folder: Path, *, num_clips: int, num_turns: int) -> None:
    """Measure both, in turns with their rivals, on sources that are written into `folder`.

    Raises:
        PomscaleError: if the results differ.
    """
    long = _write(folder / "long.mp4", (num_clips + 1) * _CLIP_FRAMES, first=0)
    length = Fraction(_CLIP_FRAMES, _SOURCE_FPS)
    report.add("the long file", megabits_per_s=long.stat().st_size * 8e-6 / float((num_clips + 1) * length))
    # From here on starts lie as often right behind a key frame as right before one, half the distance on the mean.
    first = Fraction(_KEY_FRAMES % _CLIP_FRAMES // 4, _SOURCE_FPS)
    apart = [Span(first + i * length, first + (i + 1) * length) for i in range(num_clips)]
    _ranges(report, "one after the other", long, apart, num_turns)
    halves = [Span(first + i * length / 2, first + i * length / 2 + length) for i in range(2 * num_clips - 1)]
    _ranges(report, "each half in the next", long, halves, num_turns)
    files = [_write(folder / f"{i}.mp4", _CLIP_FRAMES + 6, first=1000 * i) for i in range(num_clips)]
    _files(report, files, num_turns)


def _write(path: Path, num_frames: int, first: int) -> Path:
    """Write a film of a smooth picture that moves, under grain that is another one in every frame."""
    rng = np.random.default_rng(first)
    coarse = Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((2 * _WIDTH, 2 * _HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
    grain = rng.normal(0, _GRAIN, (2 * _HEIGHT, 2 * _WIDTH, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        options = {"g": str(_KEY_FRAMES), "keyint_min": str(_KEY_FRAMES), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=_SOURCE_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for number in range(num_frames):
            top, left = number % _HEIGHT, number % _WIDTH
            row, column = rng.integers(_HEIGHT), rng.integers(_WIDTH)
            pixels = picture[top : top + _HEIGHT, left : left + _WIDTH]
            pixels = pixels + grain[row : row + _HEIGHT, column : column + _WIDTH]
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# --- ranges of a long file -------------------------------------------------------------------------------------------


def _ranges(report: BenchReport, how: str, path: Path, spans: Sequence[Span], num_turns: int) -> None:
    rivals = {"one pass": lambda: _one_pass(path, spans), "PyAV, a seek per clip": lambda: _seeks(path, spans)}
    pairs = zip(*(decode() for decode in rivals.values()), strict=True)
    if not all(np.array_equal(ours, rival) for ours, rival in pairs):
        raise PomscaleError("one pass and a seek per clip give other frames: no figure")
    rates = _in_turns(rivals, num_turns, time.process_time)
    for name, found in rates.items():
        report.add(f"{len(spans)} ranges, {how}: {name}", clips_per_processor_s=found)
    report.compare(f"ranges, {how}: one pass over a seek per clip", _median_ratio(*rates.values()), 1.5)


def _one_pass(path: Path, spans: Sequence[Span]) -> Frames:
    with path.open("rb") as stream:
        clips = list(decode_spans(stream, spans, [_TARGET], _FPS, "area"))
    assert all(isinstance(clip, DecodedClip) for clip in clips)
    return [clip.frames for clip in clips if isinstance(clip, DecodedClip)]


def _seeks(path: Path, spans: Sequence[Span]) -> Frames:
    """Seek to the key frame before each range, and decode from there, in one thread as `decode_spans` does."""
    found = []
    for span in spans:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            video.thread_count = 1
            assert video.time_base is not None
            container.seek(int(span.start / video.time_base), stream=video)
            fitter: FrameFitter | None = None
            frames: Frames = []
            previous: av.VideoFrame | None = None
            for frame in container.decode(video):
                if previous is not None:
                    fitter = fitter or FrameFitter(previous, Fraction(1), "area", 3)
                    middle = (_seconds(previous) + _seconds(frame)) / 2 - span.start
                    num_due = min(int(middle * _FPS // 1) + 1, _TARGET[0])
                    if num_due > len(frames):
                        frames += [fitter.fit(previous, _TARGET[1:])] * (num_due - len(frames))
                if len(frames) == _TARGET[0]:
                    break
                previous = frame
            else:
                assert fitter is not None
                assert previous is not None
                frames += [fitter.fit(previous, _TARGET[1:])] * (_TARGET[0] - len(frames))
            found.append(np.stack(frames))
    return found


def _seconds(frame: av.VideoFrame) -> Fraction:
    assert frame.pts is not None
    assert frame.time_base is not None
    return frame.pts * frame.time_base


# --- files on two cores ----------------------------------------------------------------------------------------------


def _files(report: BenchReport, files: Sequence[Path], num_turns: int) -> None:
    rivals = {"two threads": lambda: _two_threads(files), "plain PyAV loop": lambda: list(map(_plain_loop, files))}
    for ours, rival in zip(*(decode() for decode in rivals.values()), strict=True):
        for number, frame in enumerate(ours):
            begin = max(0, number - 1)
            differences = np.abs(rival[begin : number + 2].astype(np.int16) - frame).mean((1, 2, 3))
            if begin + differences.argmin() != number:
                raise PomscaleError(f"the plain loop gives another frame {number}: no figure")
    rates = _in_turns(rivals, num_turns, time.perf_counter)
    for name, found in rates.items():
        report.add(f"80 frames of 240x384 from 640x400: {name}", clips_per_s=found)
    report.compare("clips/s over the plain PyAV loop", _median_ratio(*rates.values()), 1.5)


def _two_threads(files: Sequence[Path]) -> Frames:
    def decode(path: Path) -> np.ndarray:
        with path.open("rb") as stream:
            return decode_clip(stream, [_TARGET], _FPS, "area").frames

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(decode, files))


def _plain_loop(path: Path) -> np.ndarray:
    """Decode with PyAV as its documentation shows, and scale the frames that are taken."""
    frames: Frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            # The nearest in time to k / fps: its own time plus half its duration is beyond that.
            middle = _seconds(frame) + Fraction(1, 2 * _SOURCE_FPS)
            if middle * _FPS >= len(frames):
                frames.append(frame.to_ndarray(width=_TARGET[2], height=_TARGET[1], format="rgb24"))
            if len(frames) == _TARGET[0]:
                break
    return np.stack(frames)


# --- turns -----------------------------------------------------------------------------------------------------------


def _in_turns(
    rivals: dict[str, Callable[[], Frames]], num_turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return clips per second of each rival and turn."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(num_turns):
        for name, decode in rivals.items():
            start = clock()
            num_clips = len(decode())
            rates[name].append(num_clips / (clock() - start))
    return rates


def _median_ratio(ours: Sequence[float], rival: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, rival, strict=True))
