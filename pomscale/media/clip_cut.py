"""One clip out of the frames of a file: which of them it takes, and whether they fill a target.

Frame k of a clip is the frame of the file that is nearest to k / fps seconds after the clip's start, the earlier of two
equally near ones, of those that are shown before its end. The last frame counts for half its duration, or until an
interval of 1 / fps before its end if that is later: so a clip that lasts n intervals fills n frames at any rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from pomscale.media import Filter, UnreadableMediaError, nearest_bucket
from pomscale.media.clip_frames import FrameFacts, FrameReader, Shown
from pomscale.media.frame_fitter import FrameFitter
from pomscale.media.pyav import av

# Frames by which a codec may reorder: the largest buffer of H.264 and HEVC is 16 frames.
_MAX_REORDERED = 32


@dataclass(frozen=True, slots=True)
class Span:
    """Time range of a file in seconds after its first frame; `end` None is the end of the file."""

    start: Fraction = Fraction(0)
    end: Fraction | None = None

    def __str__(self) -> str:
        return f"{float(self.start):.2f} s to {'the end' if self.end is None else f'{float(self.end):.2f} s'}"


@dataclass(frozen=True, slots=True)
class Wanted:
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

    def fills_more(self, num_due: int, seconds: Fraction) -> bool:
        """Return whether a clip of a length in seconds would fill a longer target than one of `num_due` frames does."""
        num_frames = (seconds - self.interval) // self.interval + 1
        return any(num_due < target[0] <= num_frames for target in self.targets)


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
    the clip ends early, or None; range_s, begin and end in the file, only for a range of one."""
    shown: tuple[float, float]
    """Height and width in which a player shows the file, before it was fitted."""
    has_audio: bool
    """Whether the file has sound, too."""


class SharedFitter:
    """Fits frames for all clips that are open; each frame once for every size."""

    def __init__(self, frame: av.VideoFrame, pixel_aspect: Fraction, wanted: Wanted) -> None:
        self._fitter = FrameFitter(frame, pixel_aspect, wanted.filter, wanted.num_channels)
        self._frame: av.VideoFrame | None = None
        self._fitted: dict[tuple[int, int], np.ndarray] = {}
        self.shown = self._fitter.shown

    def fit(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """Return the frame in `size` = (h, w), as (h, w, channels) uint8, which is not to be changed."""
        if frame is not self._frame:
            self._frame, self._fitted = frame, {}
        if size not in self._fitted:
            self._fitted[size] = self._fitter.fit(frame, size)
        return self._fitted[size]


@dataclass
class _Collected:
    """Fitted frames of one size, as many as the longest target of that size takes."""

    limit: int
    frames: list[np.ndarray] = field(default_factory=list)


class Cut:
    """A clip that takes its frames from those of a file as they come."""

    def __init__(self, span: Span, wanted: Wanted, fitter: SharedFitter) -> None:
        self.span = span
        self.is_done = False
        self.num_due = 0
        """Number of frames of the result so far."""
        self.reached_end = False
        """Whether it was read up to the end of its span."""
        self.facts = FrameFacts()
        self._wanted, self._fitter = wanted, fitter
        self._chosen = _nearest_by_length(fitter.shown, wanted.targets)
        self._sizes: dict[tuple[int, int], _Collected] = {}
        for length, index in self._chosen.items():
            self._sizes.setdefault(wanted.targets[index][1:], _Collected(length))
        self._previous: Shown | None = None
        self._first: Shown | None = None
        self._num_awaited = 0
        self._num_dropped = 0

    def offer(self, shown: Shown, reader: FrameReader) -> None:
        """Take the file's next frame; the first one is the last at or before the start, if there is one.

        Raises UnreadableMediaError if its colours cannot be read.
        """
        if self.span.end is not None and shown.time >= self.span.end:
            self.finish(self.span.end, reader)
            return
        is_first = self._previous is None or not self._settle((self._previous.time + shown.time) / 2)
        if is_first:
            self._first, self.facts = shown, FrameFacts()
        self._previous = shown
        self.facts.count(shown.time)
        if self.num_due == self._wanted.num_frames and not self._awaits_earlier(reader):
            self._close(reader)

    def finish(self, end: Fraction, reader: FrameReader) -> None:
        """Take no further frame, since the file or the clip ends at `end`, in seconds after the file's first frame."""
        if self.span.end is not None and self.span.end <= end:
            end, self.reached_end = self.span.end, True
        if self._previous is not None:
            self._settle(max((self._previous.time + end) / 2, end - self._wanted.interval))
        self._close(reader)

    def filled(self, early: str | None) -> tuple[np.ndarray, int] | None:
        """Return the frames of the longest target that is filled, and its index; None if there is none.

        Raises UnreadableMediaError where the clip ends `early` and is not to be kept.
        """
        for length, index in self._chosen.items():
            if length <= self.num_due:
                if early is not None and not self._wanted.keep_incomplete:
                    raise UnreadableMediaError(
                        f"has {early}; replace the file{'' if self.span == Span() else ', correct the range'}, or keep "
                        f"such clips as shorter ones: transform.incomplete: keep"
                    )
                return np.stack(self._sizes[self._wanted.targets[index][1:]].frames[:length]), index
        return None

    @property
    def shown(self) -> tuple[float, float]:
        return self._fitter.shown

    def info(self, reader: FrameReader) -> dict[str, Any]:
        """Return the facts of `DecodedClip.info` about the frames that were read."""
        assert reader.first is not None
        return {
            "width": reader.first.width,
            "height": reader.first.height,
            "source_fps": self.facts.rate,
            "num_source_frames": self.facts.num_frames,
            "num_dropped_frames": self._num_dropped,
            "times": "frames" if reader.has_own_times else "even",
            "variable_rate": self.facts.is_variable,
        }

    def _settle(self, until: Fraction) -> bool:
        """Take the previous frame, which is the nearest up to a time; return False if that is before the start."""
        assert self._previous is not None
        after_start = until - self.span.start
        if after_start < 0:
            return False
        self.num_due = min(int(after_start // self._wanted.interval) + 1, self._wanted.num_frames)
        for size, collected in self._sizes.items():
            num_missing = min(self.num_due, collected.limit) - len(collected.frames)
            if num_missing > 0:
                collected.frames += [self._fitter.fit(self._previous.frame, size)] * num_missing
        return True

    def _awaits_earlier(self, reader: FrameReader) -> bool:
        if self._first is None or not reader.awaits_earlier(self._first.ticks):
            return False
        self._num_awaited += 1
        return self._num_awaited <= _MAX_REORDERED

    def _close(self, reader: FrameReader) -> None:
        self._num_dropped = 0 if self._first is None else reader.num_dropped - self._first.num_dropped
        self.is_done = True


def _nearest_by_length(shown: tuple[float, float], targets: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    """Return for every number of frames, from the largest, the index of the target of the nearest aspect ratio."""
    chosen = {}
    for length in sorted({target[0] for target in targets}, reverse=True):
        indices = [index for index, target in enumerate(targets) if target[0] == length]
        chosen[length] = indices[nearest_bucket(shown, [targets[index] for index in indices])]
    return chosen
