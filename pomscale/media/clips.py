"""Decode video files, or time ranges of them, to frames of one size, evenly spaced in time.

Frame k of the result is the source frame whose presentation time is nearest to k / fps seconds after the first frame's,
the earlier of two equally near ones. So it is right to half a source frame at a constant rate, and as near as can be at
a variable one. A clip fills f frames if it lasts f / fps seconds, or if the last of them lies no more than half a
frame's duration after the last of the source. Only as much is decoded as that needs.

A clip that ends early, since it is damaged or cut off, does not become a shorter one without a trace: it is refused, or
kept and marked. `clip_frames` has the rules for times, ends and gaps, `clip_cut` those for the frames that a clip
takes, `frame_fitter` those for space and colours.

Several ranges of one file are decoded in one pass: each frame once, whatever number of ranges it is in. A range gets
what it gets when it is decoded alone, to the bit: whatever the pass cannot finish without doubt (damage, times that go
back) is decoded alone.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pomscale.media import Filter, UnreadableMediaError
from pomscale.media.clip_cut import Cut, DecodedClip, SharedFitter, Span, Wanted
from pomscale.media.clip_frames import FrameReader, NoEntryError, Shown, StrayTimesError
from pomscale.media.pyav import av
from pomscale.media.video_file import even_spacing, open_video, seconds_of_all_streams, stated_seconds

__all__ = ["DecodedClip", "Span", "as_unreadable", "decode_clip", "decode_spans", "read_grey_frames"]

# Seconds beyond a clip in which its packets must be evenly spaced, too: more than any codec reorders.
_SPACING_MARGIN_S = 2.0

# Ranges that may overlap in one pass; each holds its frames.
_MAX_OPEN = 8


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
    return _decode_alone(stream, Span(), Wanted(targets, fps, filter, num_channels, keep_incomplete))


def decode_spans(
    stream: BinaryIO,
    spans: Sequence[Span],
    targets: Sequence[tuple[int, int, int]],
    fps: float,
    filter: Filter,
    num_channels: int = 3,
    *,
    keep_incomplete: bool = False,
) -> Iterator[DecodedClip | UnreadableMediaError]:
    """Yield a clip for each range of a file, or why there is none, in their order; in one pass if they start in order.

    Frames at or after a range's end are not used. A range that ends beyond the file's end ends early, as does one that
    is damaged, unless what is there fills the longest target.

    Args:
        stream: The video file, seekable.
        spans: Ranges of it; where one starts before the one that precedes it, another pass begins.
        targets: Possible sizes (frames, height, width).
        fps: Frames per second of the result.
        filter: How frames are scaled.
        num_channels: 3 for RGB, 1 for grey.
        keep_incomplete: Whether a range that ends early gets the target that what precedes its end fills.
    """
    wanted = Wanted(targets, fps, filter, num_channels, keep_incomplete)
    remaining = deque(spans)
    while remaining:
        try:
            if len(remaining) > 1:
                with as_unreadable():
                    for clip in _decode_pass(stream, _ascending(remaining), wanted):
                        remaining.popleft()
                        yield clip
                continue
        except (StrayTimesError, NoEntryError, UnreadableMediaError):
            pass  # it may concern one range alone
        try:
            clip = _decode_alone(stream, remaining.popleft(), wanted)
        except UnreadableMediaError as error:
            yield error
        else:
            yield clip


def _ascending(spans: Iterable[Span]) -> list[Span]:
    """Return the first ranges, as far as none starts before the one that precedes it."""
    found: list[Span] = []
    for span in spans:
        if found and span.start < found[-1].start:
            break
        found.append(span)
    return found


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


def _decode_alone(stream: BinaryIO, span: Span, wanted: Wanted) -> DecodedClip:
    """Decode one range by its frames' times, or by even ones where those are of no use. Raises UnreadableMediaError."""
    with as_unreadable():
        try:
            return _decode_once(stream, span, wanted)
        except StrayTimesError as error:
            reason = str(error)
        spacing = even_spacing(stream, float(span.start) + wanted.num_frames / wanted.fps + _SPACING_MARGIN_S)
        if spacing is None:
            raise UnreadableMediaError(
                f"{reason}, and its packets are not evenly spaced, so its speed is unknown; write it anew, for example "
                f"with: ffmpeg -i OLD NEW.mp4"
            )
        return _decode_once(stream, span, wanted, spacing)


def _decode_once(stream: BinaryIO, span: Span, wanted: Wanted, spacing: Fraction | None = None) -> DecodedClip:
    try:
        (clip,) = _decode_pass(stream, [span], wanted, spacing)
    except NoEntryError:
        (clip,) = _decode_pass(stream, [span], wanted, spacing, skips=False)
    return clip


def _decode_pass(
    stream: BinaryIO, spans: list[Span], wanted: Wanted, spacing: Fraction | None = None, *, skips: bool = True
) -> Iterator[DecodedClip]:
    """Yield the clips of ranges in their order, as many as one pass makes; the first ones, and at least one.

    Raises:
        UnreadableMediaError: The file or the next range cannot be used; where there are several ranges, also where the
            file is damaged.
        StrayTimesError: The frames' times are of no use, from some frame on.
        NoEntryError: Frames may not be skipped in this file.
    """
    with open_video(stream) as (container, video):
        reader = FrameReader(container, video, spacing)
        file = _File(stream, container, video, reader, wanted)
        cuts = _Cuts(spans, wanted, reader)
        for shown in reader.timed():
            cuts.offer(shown)
            while (cut := cuts.pop_done()) is not None:
                yield file.clip(cut)
            if cuts.is_empty:
                return
            if skips and (next_start := cuts.next_start()) is not None and next_start > shown.time:
                reader.skip_to(next_start)
        if reader.first is None:
            raise file.too_short(file.early(0, spans[0]) or "0.00 s")
        if reader.stopped is not None and len(spans) > 1:
            raise UnreadableMediaError(f"has {reader.stopped}")
        cuts.finish()
        while (cut := cuts.pop_done()) is not None:
            yield file.clip(cut)


class _Cuts:
    """The clips of a pass: those that wait for their first frame, and the others in their order."""

    def __init__(self, spans: list[Span], wanted: Wanted, reader: FrameReader) -> None:
        self._wanted, self._reader = wanted, reader
        self._waiting = deque(spans)
        self._begun: deque[Cut] = deque()
        self._fitter: SharedFitter | None = None
        self._previous: Shown | None = None
        self._num_skips = 0

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._begun

    def next_start(self) -> Fraction | None:
        """Return when the next clip starts, if no other needs the frames before; else None."""
        is_idle = all(cut.is_done for cut in self._begun)
        return self._waiting[0].start if is_idle and self._waiting else None

    def offer(self, shown: Shown) -> None:
        """Give the clips the next frame of the file. Raises UnreadableMediaError if it cannot be used."""
        if self._fitter is None:
            self._fitter = SharedFitter(shown.frame, self._reader.pixel_aspect, self._wanted)
        if self._reader.num_skips != self._num_skips:  # the frame before this one was left out
            self._num_skips, self._previous = self._reader.num_skips, None
        while self._waiting and self._waiting[0].start <= shown.time:
            if sum(not cut.is_done for cut in self._begun) == _MAX_OPEN:
                self._waiting.clear()  # the next pass begins with them
            else:
                self._begin()
        for cut in self._begun:
            if not cut.is_done:
                cut.offer(shown, self._reader)
        self._previous = shown

    def finish(self) -> None:
        """End all clips with the file."""
        while self._waiting:
            self._begin()
        for cut in self._begun:
            if not cut.is_done:
                cut.finish(self._reader.seconds, self._reader)

    def pop_done(self) -> Cut | None:
        """Return the next clip in order if it has all of its frames."""
        return self._begun.popleft() if self._begun and self._begun[0].is_done else None

    def _begin(self) -> None:
        assert self._fitter is not None
        cut = Cut(self._waiting.popleft(), self._wanted, self._fitter)
        if self._previous is not None:  # it may be nearer to the start than the one that has come
            cut.offer(self._previous, self._reader)
        self._begun.append(cut)


@dataclass(frozen=True)
class _File:
    """An open video file, and what it states of its length."""

    stream: BinaryIO
    container: av.container.InputContainer
    video: av.VideoStream
    reader: FrameReader
    wanted: Wanted

    def clip(self, cut: Cut) -> DecodedClip:
        """Return a clip whose frames are all there. Raises UnreadableMediaError if they do not fill a target."""
        span, reader = cut.span, self.reader
        if cut.num_due == 0 and span.start > 0 and not cut.reached_end:
            end = reader.stopped or "the video's end"
            raise UnreadableMediaError(f"its range, {span}, begins beyond {end} at {float(reader.seconds):.2f} s")
        is_cut_short = cut.num_due < self.wanted.num_frames and not cut.reached_end
        early = self.early(cut.num_due, span) if is_cut_short else None
        filled = cut.filled(early)
        if filled is None:
            seconds = (reader.seconds if span.end is None else span.end) - span.start
            raise self.too_short(early or f"{float(seconds):.2f} s")
        stated, _ = stated_seconds(self.container, self.video)
        info = {"duration_s": None if stated is None else round(stated, 3), **cut.info(reader), "incomplete": early}
        if span.end is not None:
            info["range_s"] = [round(float(span.start), 6), round(float(span.end), 6)]
        return DecodedClip(*filled, info, cut.shown, bool(self.container.streams.audio))

    def too_short(self, has: str) -> UnreadableMediaError:
        shortest = min(target[0] for target in self.wanted.targets)
        fps = self.wanted.fps
        return UnreadableMediaError(
            f"has {has}; needs at least {shortest / fps:g} s for {shortest} frames at {fps:g} fps"
        )

    def early(self, num_due: int, span: Span) -> str | None:
        """Return why a range that fills `num_due` frames ends early, as the end of "has ..."; None if it does not."""
        stated, is_own = stated_seconds(self.container, self.video)
        seconds = self.reader.seconds - span.start
        if span.end is None:
            of = "" if stated is None else f" of {stated:.2f} s"
            reason = self.reader.stopped or self._cut_off(num_due, stated, is_own)
        else:
            of = f" of its range, {span}"
            is_longer = self.wanted.fills_more(num_due, span.end - span.start)
            reason = self.reader.stopped or ("the video's end" if is_longer else None)
        if reason is None:
            return None
        return f"{float(seconds):.2f} s{of}, then {reason} ({self.container.format.long_name})"

    def _cut_off(self, num_due: int, stated: float | None, is_own: bool) -> str | None:
        """Return "the end of the file" if it states a length with which the clip would fill a longer target."""
        reader = self.reader
        half_frame = reader.seconds / max(2 * reader.facts.num_frames, 1)
        if stated is None or stated - half_frame <= max(reader.seconds, reader.end):
            return None
        num_stated = max(stated - half_frame, stated - self.wanted.interval) // self.wanted.interval + 1
        if not any(num_due < target[0] <= num_stated for target in self.wanted.targets):
            return None
        # A length of the whole file may be that of its sound, which often is longer than the pictures.
        if not is_own and seconds_of_all_streams(self.stream) >= stated - half_frame:
            return None
        return "the end of the file"


def read_grey_frames(path: Path) -> np.ndarray:
    """Return all frames of a video file as they are stored, in grey: (f, h, w) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
