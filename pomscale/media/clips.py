"""Decode video files to frames of one size, evenly spaced in time.

**Time.** Frame k of the result is the source frame whose presentation time is nearest to k / fps seconds after the
first frame's, the earlier of two equally near ones. So it is right to half a source frame at a constant rate, and as
near as can be at a variable one. A clip fills f frames if it lasts f / fps seconds, or if the last of them lies no more
than half a frame's duration after the last of the source. Only as much is decoded as that needs.

**Space.** A frame is scaled to just cover the target and its centre cut out, in the shape it is shown in: turned and
mirrored as the display matrix says, with pixels that need not be square. swscale does it from the decoder's colours in
one go, in its accurate and bit-exact mode: the fast one is up to two grey levels off, and differs between processors.
"area" is then the exact mean over the area (tests/data/test_clips.py).

Times come from the frames alone, never from a rate in a header. Containers that give no times, or times that go back
(AVI with reordered frames), are read up to there, as damaged ones are up to the damage.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pomscale.base.errors import InputError
from pomscale.media import Filter, UnreadableMediaError, nearest_bucket

try:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter
except ImportError as error:
    raise InputError(f"clips need the package av: {error}. Run: pip install -e '.[video]'") from error

# Containers, as FFmpeg names them. Not playlists and the like: those make FFmpeg open further files and addresses.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"

# Names of swscale for 1 channel, from black 0 to white 255, and 3.
_FORMATS_OUT = {1: "gray", 3: "rgb24"}

# Wider or higher ones are no pictures, and to cover a target they would take any amount of memory.
_MAX_ASPECT = 16

_ACCURATE = (
    Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_SCALERS: dict[Filter, int] = {"area": Interpolation.AREA | _ACCURATE, "lanczos": Interpolation.LANCZOS | _ACCURATE}


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """A decoded clip."""

    frames: np.ndarray
    """(f, h, w, 3) uint8, RGB, or (f, h, w, 1), grey."""
    target: int
    """Index of the target whose size the frames have."""
    info: dict[str, Any]
    """Facts for the record's JSON: width and height of the file, duration_s by its header, source_fps (the mean) and
    num_source_frames of the decoded part, and whether their rate varies."""


def decode_clip(
    stream: BinaryIO, targets: Sequence[tuple[int, int, int]], fps: float, filter: Filter, num_channels: int = 3
) -> DecodedClip:
    """Return the first seconds of a clip in the best of several sizes.

    The clip gets the longest target that it can fill, and of those the one of the nearest aspect ratio. Decoding runs
    in this thread alone; other threads may decode other streams meanwhile.

    Args:
        stream: The video file, seekable.
        targets: Possible sizes (frames, height, width).
        fps: Frames per second of the result.
        filter: How frames are scaled.
        num_channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableMediaError: The file is no video or too short. Errors of reading the stream are passed on instead,
            since they say nothing about the clip.
    """
    try:
        with av.open(stream, "r", options={"format_whitelist": _FORMATS}, metadata_errors="ignore") as container:
            video = container.streams.best("video")
            if not isinstance(video, av.VideoStream):
                raise UnreadableMediaError("has no video stream")
            if video.codec_context is None:
                raise UnreadableMediaError("its codec is unknown")
            # The recipe's threads decode a clip each; more inside each of them would only get in their way.
            video.thread_count = 1
            reader = _FrameReader(container, video)
            frames, target = _resample(reader, targets, fps, filter, num_channels)
            seconds = _header_seconds(container, video)
    except av.FFmpegError as error:
        raise UnreadableMediaError(f"no video that can be read: {error.strerror}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Damaged tables make FFmpeg seek to before the start of the file.
        raise UnreadableMediaError("no video that can be read: it points outside of the file") from error
    return DecodedClip(frames, target, {"duration_s": seconds} | reader.info())


def _resample(
    reader: _FrameReader, targets: Sequence[tuple[int, int, int]], fps: float, filter: Filter, num_channels: int
) -> tuple[np.ndarray, int]:
    """Return frames (f, h, w, num_channels) uint8 and the index of their target, known when the source has ended."""
    interval = 1 / Fraction(fps)
    longest = max(target[0] for target in targets)
    chosen: dict[int, int] = {}  # by number of frames, longest first: the target of a clip that fills no more
    sizes: dict[tuple[int, int], _Collected] = {}
    num_due = 0
    for frame, until in reader.nearest(interval):
        if not chosen:
            fitter = _Fitter(frame, reader.pixel_aspect, filter, num_channels)
            chosen = _nearest_by_length(fitter.shown, targets)
            for length, index in chosen.items():
                sizes.setdefault(targets[index][1:], _Collected(length))
        num_due = min(until // interval + 1, longest)
        for size, collected in sizes.items():
            num_missing = min(num_due, collected.limit) - len(collected.frames)
            if num_missing > 0:
                collected.frames += [fitter.fit(frame, size)] * num_missing
        if num_due == longest:
            break
    for length, index in chosen.items():
        if length <= num_due:
            return np.stack(sizes[targets[index][1:]].frames[:length]), index
    shortest = min(target[0] for target in targets)
    raise UnreadableMediaError(
        f"has {float(reader.seconds):.2f} s{reader.stopped}; "
        f"needs at least {shortest / fps:g} s for {shortest} frames at {fps:g} fps"
    )


@dataclass
class _Collected:
    """Fitted frames of one size, as many as the longest target of that size takes."""

    limit: int
    frames: list[np.ndarray] = field(default_factory=list)


def _nearest_by_length(shown: tuple[float, float], targets: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    """Return for every number of frames, from the largest, the index of the target of the nearest aspect ratio."""
    chosen = {}
    for length in sorted({target[0] for target in targets}, reverse=True):
        indices = [index for index, target in enumerate(targets) if target[0] == length]
        chosen[length] = indices[nearest_bucket(shown, [targets[index] for index in indices])]
    return chosen


class _FrameReader:
    """The frames of a video with their times, until it ends or is damaged."""

    def __init__(self, container: av.container.InputContainer, video: av.VideoStream) -> None:
        self._container, self._video = container, video
        self._first: av.VideoFrame | None = None
        self._gaps: tuple[Fraction, Fraction] | None = None  # the shortest and the longest between frames
        self._last_time = Fraction(0)
        self.num_frames = 0
        self.seconds = Fraction(0)  # duration of the frames so far, the last one included
        self.stopped = ""  # why reading stopped before the end

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel over its height."""
        return self._video.sample_aspect_ratio or Fraction(1)

    def nearest(self, interval: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        """Yield every frame with the time up to which it is the nearest, in seconds after the first frame's.

        The last one counts for half its duration, or until an `interval` before it ends if that is later: so a clip
        that lasts n intervals fills n frames at any rate.
        """
        previous: av.VideoFrame | None = None
        for frame, time in self._timed():
            middle = (self._last_time + time) / 2
            self._count(frame, time)
            if previous is not None:
                yield previous, middle
            previous = frame
        if previous is not None:
            yield previous, max((self._last_time + self.seconds) / 2, self.seconds - interval)

    def info(self) -> dict[str, Any]:
        assert self._first is not None
        rate = (self.num_frames - 1) / self._last_time if self._last_time else None
        return {
            "width": self._first.width,
            "height": self._first.height,
            "source_fps": None if rate is None else round(float(rate), 3),
            "num_source_frames": self.num_frames,
            # Rounding of times (Matroska: to milliseconds) changes gaps by far less, a dropped frame by more.
            "variable_rate": self._gaps is not None and self._gaps[1] > 1.5 * self._gaps[0],
        }

    def _timed(self) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        start = Fraction(0)
        try:
            for frame in self._container.decode(self._video):
                if frame.is_corrupt:
                    self.stopped = ", then a damaged frame"
                    return
                if frame.pts is None or frame.time_base is None:
                    self.stopped = ", then a frame without a time"
                    return
                time = frame.pts * frame.time_base
                if self._first is None:
                    self._first, start = frame, time
                elif time - start <= self._last_time:
                    self.stopped = ", then its times go back"
                    return
                elif (frame.width, frame.height) != (self._first.width, self._first.height):
                    self.stopped = ", then its size changes"
                    return
                yield frame, time - start
        except av.FFmpegError as error:
            self.stopped = f", then {error.strerror}"

    def _count(self, frame: av.VideoFrame, time: Fraction) -> None:
        duration = frame.duration * frame.time_base if frame.time_base is not None else Fraction(0)
        if self.num_frames:
            gap = time - self._last_time
            shortest, longest = self._gaps or (gap, gap)
            self._gaps = min(shortest, gap), max(longest, gap)
            duration = duration or gap  # several containers do not say how long a frame is shown
        self.num_frames += 1
        self._last_time = time
        self.seconds = time + duration


class _Fitter:
    """Scales, cuts and turns the frames of one clip."""

    def __init__(self, frame: av.VideoFrame, pixel_aspect: Fraction, filter: Filter, num_channels: int) -> None:
        self._transposed, self._flipped_rows, self._flipped_columns = _orientation(frame)
        self._height, self._width = float(frame.height), float(frame.width * pixel_aspect)
        if max(self._height / self._width, self._width / self._height) > _MAX_ASPECT:
            raise UnreadableMediaError(f"is shown as {self._width:.0f}x{self._height:.0f}: too narrow a strip")
        self._scaler, self._interpolation = VideoReformatter(), _SCALERS[filter]
        self._num_channels, self._format = num_channels, _FORMATS_OUT[num_channels]

    @property
    def shown(self) -> tuple[float, float]:
        """Height and width in which a player shows the clip."""
        return (self._width, self._height) if self._transposed else (self._height, self._width)

    def fit(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """Return the frame in `size` = (h, w), as (h, w, num_channels) uint8."""
        height, width = reversed(size) if self._transposed else size
        scale = max(height / self._height, width / self._width)
        cover_height = max(height, round(self._height * scale))
        cover_width = max(width, round(self._width * scale))
        cover = self._scaler.reformat(
            frame, cover_width, cover_height, self._format, interpolation=self._interpolation, threads=1
        ).to_ndarray()
        cover = cover.reshape(cover_height, cover_width, self._num_channels)
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        pixels = cover[top : top + height, left : left + width]
        if self._transposed:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if self._flipped_rows else 1, :: -1 if self._flipped_columns else 1]
        return np.ascontiguousarray(pixels)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to transpose a frame, then to reverse its rows, then its columns, to turn it upright.

    The display matrix (a b u; c d v; x y w) puts a pixel (p, q), right and down, at (a p + c q, b p + d q).
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if (b, c) == (0, 0) and a and d:
        return False, d < 0, a < 0
    if (a, d) == (0, 0) and b and c:
        return True, b < 0, c < 0
    raise UnreadableMediaError("is to be shown turned by an angle that is no multiple of 90 degrees")


def _header_seconds(container: av.container.InputContainer, video: av.VideoStream) -> float | None:
    if video.duration is not None and video.time_base is not None:
        return round(float(video.duration * video.time_base), 3)
    return None if container.duration is None else round(container.duration / av.time_base, 3)


def read_grey_frames(path: Path) -> np.ndarray:
    """Return all frames of a video file as they are stored, in grey: (f, h, w) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
