"""Decode video files to frames of one size, evenly spaced in time.

Frame k of the result is the source frame whose presentation time is nearest to k / fps seconds after the first frame's,
the earlier of two equally near ones. So it is right to half a source frame at a constant rate, and as near as can be at
a variable one. A clip fills f frames if it lasts f / fps seconds, or if the last of them lies no more than half a
frame's duration after the last of the source. Only as much is decoded as that needs.

A clip that ends early, since it is damaged or cut off, does not become a shorter one without a trace: it is refused, or
kept and marked. `clip_frames` has the rules for times and ends, `frame_fitter` those for space and colours.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pomscale.media import Filter, UnreadableMediaError, nearest_bucket
from pomscale.media.clip_frames import (
    FrameReader,
    StrayTimesError,
    even_spacing,
    open_video,
    seconds_of_all_streams,
    stated_seconds,
)
from pomscale.media.frame_fitter import FrameFitter
from pomscale.media.pyav import av

# Seconds beyond a clip in which its packets must be evenly spaced, too: more than any codec reorders.
_SPACING_MARGIN_S = 2.0


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """A decoded clip."""

    frames: np.ndarray
    """(f, h, w, 3) uint8, RGB, or (f, h, w, 1), grey."""
    target: int
    """Index of the target whose size the frames have."""
    info: dict[str, Any]
    """Facts for the record's JSON: width and height of the file, duration_s as it states; source_fps (the mean) and
    num_source_frames of the decoded part, num_dropped_frames with the time of the one before, whether the rate varies;
    times, "frames" if they are the frames' own, "even" if each is its frame's number over the rate; incomplete, why
    the clip ends early, or None."""
    shown: tuple[float, float]
    """Height and width in which a player shows the file, before it was fitted."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The result that is asked for."""

    targets: Sequence[tuple[int, int, int]]
    fps: float
    filter: Filter
    num_channels: int
    keep_incomplete: bool

    @property
    def interval(self) -> Fraction:
        return 1 / Fraction(self.fps)

    @property
    def num_frames(self) -> int:
        """Number of frames of the longest target."""
        return max(target[0] for target in self.targets)


def decode_clip(
    stream: BinaryIO,
    targets: Sequence[tuple[int, int, int]],
    fps: float,
    filter: Filter,
    num_channels: int = 3,
    *,
    keep_incomplete: bool = False,
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
        keep_incomplete: Whether a clip that ends early gets the target that what precedes its end fills.

    Raises:
        UnreadableMediaError: The file is no video, too short, without usable times, or ends early. Errors of reading
            the stream are passed on instead, since they say nothing about the clip.
    """
    wanted = _Wanted(targets, fps, filter, num_channels, keep_incomplete)
    with as_unreadable():
        try:
            return _decode(stream, wanted)
        except StrayTimesError as error:
            reason = str(error)
        spacing = even_spacing(stream, wanted.num_frames / fps + _SPACING_MARGIN_S)
        if spacing is None:
            raise UnreadableMediaError(
                f"{reason}, and its packets are not evenly spaced, so its speed is unknown; write it anew, for example "
                f"with: ffmpeg -i OLD NEW.mp4"
            )
        return _decode(stream, wanted, spacing)


@contextmanager
def as_unreadable() -> Iterator[None]:
    """Raise FFmpeg's errors in the block as UnreadableMediaError."""
    try:
        yield
    except av.FFmpegError as error:
        raise UnreadableMediaError(f"no video that can be read: {error.strerror}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Damaged tables make FFmpeg seek to before the start of the file.
        raise UnreadableMediaError("no video that can be read: it points outside of the file") from error


def _decode(stream: BinaryIO, wanted: _Wanted, spacing: Fraction | None = None) -> DecodedClip:
    """Decode a clip by its frames' times, or by `spacing`. Raises StrayTimesError where the times are of no use."""
    with open_video(stream) as (container, video):
        reader = FrameReader(container, video, spacing)
        resampled = _resample(reader, wanted)
        stated, _ = stated_seconds(container, video)
        early = None
        if resampled.num_due < wanted.num_frames:
            early = reader.stopped or _cut_off(stream, container, video, reader, resampled.num_due, wanted)
        if early is not None:
            of = "" if stated is None else f" of {stated:.2f} s"
            early = f"{float(reader.seconds):.2f} s{of}, then {early} ({container.format.long_name})"
        frames, target = _filled(resampled, reader, wanted, early)
    info = {"duration_s": None if stated is None else round(stated, 3), **reader.info(), "incomplete": early}
    return DecodedClip(frames, target, info, resampled.shown)


@dataclass
class _Collected:
    """Fitted frames of one size, as many as the longest target of that size takes."""

    limit: int
    frames: list[np.ndarray] = field(default_factory=list)


@dataclass
class _Resampled:
    """Fitted frames of every size that the clip may get, until it ended."""

    num_due: int = 0
    shown: tuple[float, float] = (0.0, 0.0)
    chosen: dict[int, int] = field(default_factory=dict)
    """By number of frames, longest first: the target of a clip that fills no more."""
    sizes: dict[tuple[int, int], _Collected] = field(default_factory=dict)


def _resample(reader: FrameReader, wanted: _Wanted) -> _Resampled:
    """Read until the longest target is filled, or the clip ends."""
    longest, result = wanted.num_frames, _Resampled()
    for frame, until in reader.nearest(wanted.interval):
        if not result.chosen:
            fitter = FrameFitter(frame, reader.pixel_aspect, wanted.filter, wanted.num_channels)
            result.shown = fitter.shown
            result.chosen = _nearest_by_length(fitter.shown, wanted.targets)
            for length, index in result.chosen.items():
                result.sizes.setdefault(wanted.targets[index][1:], _Collected(length))
        result.num_due = min(until // wanted.interval + 1, longest)
        for size, collected in result.sizes.items():
            num_missing = min(result.num_due, collected.limit) - len(collected.frames)
            if num_missing > 0:
                collected.frames += [fitter.fit(frame, size)] * num_missing
        if result.num_due == longest and not reader.awaits_earlier():
            break
    return result


def _filled(resampled: _Resampled, reader: FrameReader, wanted: _Wanted, early: str | None) -> tuple[np.ndarray, int]:
    """Return the frames of the longest target that is filled, and its index.

    Raises UnreadableMediaError where none is, or where the clip ends `early` and is not to be kept.
    """
    for length, index in resampled.chosen.items():
        if length <= resampled.num_due:
            if early is not None and not wanted.keep_incomplete:
                raise UnreadableMediaError(
                    f"has {early}; replace the file, or keep such clips as shorter ones: transform.incomplete: keep"
                )
            return np.stack(resampled.sizes[wanted.targets[index][1:]].frames[:length]), index
    shortest = min(target[0] for target in wanted.targets)
    raise UnreadableMediaError(
        f"has {early or f'{float(reader.seconds):.2f} s'}; "
        f"needs at least {shortest / wanted.fps:g} s for {shortest} frames at {wanted.fps:g} fps"
    )


def _nearest_by_length(shown: tuple[float, float], targets: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    """Return for every number of frames, from the largest, the index of the target of the nearest aspect ratio."""
    chosen = {}
    for length in sorted({target[0] for target in targets}, reverse=True):
        indices = [index for index, target in enumerate(targets) if target[0] == length]
        chosen[length] = indices[nearest_bucket(shown, [targets[index] for index in indices])]
    return chosen


def _cut_off(
    stream: BinaryIO,
    container: av.container.InputContainer,
    video: av.VideoStream,
    reader: FrameReader,
    num_due: int,
    wanted: _Wanted,
) -> str | None:
    """Return "the end of the file" if it states a length with which the clip would fill a longer target, else None."""
    stated, is_own = stated_seconds(container, video)
    half_frame = reader.seconds / max(2 * reader.num_frames, 1)
    if stated is None or stated - half_frame <= max(reader.seconds, reader.end):
        return None
    num_stated = max(stated - half_frame, stated - wanted.interval) // wanted.interval + 1
    if not any(num_due < target[0] <= num_stated for target in wanted.targets):
        return None
    # A length of the whole file may be that of its sound, which often is longer than the pictures.
    if not is_own and seconds_of_all_streams(stream) >= stated - half_frame:
        return None
    return "the end of the file"


def read_grey_frames(path: Path) -> np.ndarray:
    """Return all frames of a video file as they are stored, in grey: (f, h, w) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
