"""Read the frames of a video file in the order in which they are shown, each with its time.

**Times** are those of the frames, as long as they increase. A frame with the time of the one before it is dropped.

AVI keeps the times of decoding alone. Those are the times of showing as long as frames are not reordered. Where they
are, and where times go back or are missing (files that were copied out of an AVI), the decoder has the right order, and
only the times are wrong. If the packets of such a file are evenly spaced, a frame's time is its number times their
distance (`even_spacing`); else there is no way to know it, and the clip cannot be used.

**Ends.** Reading stops at damage, or where the frame size changes. A file that was cut off looks like a shorter one to
most demuxers, so what was read is compared with the length that the file states.

**Gaps.** Frames that nobody needs are not decoded where a key frame lies behind them: the packets up to it are read and
dropped. A key frame is an entry if all packets before it have earlier times, and if the decoder gives it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from pomscale.media.pyav import av
from pomscale.media.video_file import AVI

# Decoders of VP8 and VP9 that read transparency, which Matroska and WebM keep beside the packets.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Bytes of packets that may wait for the next key frame.
_MAX_HELD_BYTES = 2**26


class StrayTimesError(Exception):
    """The frames' times go back or are missing. The message is a reason of UnreadableMediaError without its cause."""


class NoEntryError(Exception):
    """The decoder gave another frame first than the key frame behind a gap, so nothing may be skipped in this file."""


@dataclass
class FrameFacts:
    """Number and times of frames that were read one after the other."""

    num_frames: int = 0
    first_time: Fraction = Fraction(0)
    last_time: Fraction = Fraction(0)
    gaps: tuple[Fraction, Fraction] | None = None
    """The shortest and the longest time from a frame to the next."""

    def count(self, time: Fraction) -> None:
        """Count a frame with its time in seconds."""
        if self.num_frames:
            gap = time - self.last_time
            shortest, longest = self.gaps or (gap, gap)
            self.gaps = min(shortest, gap), max(longest, gap)
        else:
            self.first_time = time
        self.num_frames += 1
        self.last_time = time

    @property
    def rate(self) -> float | None:
        """Mean of the frames per second; None for a single frame."""
        seconds = self.last_time - self.first_time
        return round(float((self.num_frames - 1) / seconds), 3) if seconds else None

    @property
    def is_variable(self) -> bool:
        """Whether the rate varies: rounding of times (Matroska) changes gaps by far less, a lost frame by more."""
        return self.gaps is not None and self.gaps[1] > 1.5 * self.gaps[0]


class Shown(NamedTuple):
    """One frame of a file."""

    frame: av.VideoFrame
    time: Fraction
    """Seconds after the first frame."""
    ticks: int
    """Time in the file's own unit; 0 where frames have even times."""
    num_dropped: int
    """Frames dropped before it."""


class FrameReader:
    """The frames of a video with their times, until it ends or is damaged."""

    def __init__(
        self, container: av.container.InputContainer, video: av.VideoStream, spacing: Fraction | None = None
    ) -> None:
        """Begin to read. `spacing` is the seconds between frames where their own times are not to be used."""
        self._container, self._video, self._spacing = container, video, spacing
        self._container_name = container.format.long_name
        self._is_avi = container.format.name == AVI
        self._decoder = _alpha_decoder(video)
        self._start = Fraction(0)
        self._last_time: Fraction | None = None
        self._latest_ticks: int | None = None  # latest time of all packets so far
        self._skip_target: int | None = None
        self._last_ticks = 0
        self._undecoded: set[int] = set()  # times of packets whose frames have not come yet
        self.first: av.VideoFrame | None = None
        self.facts = FrameFacts()
        self.num_dropped = 0
        self.num_skips = 0
        self.seconds = Fraction(0)  # end of the last frame, after the first one's beginning
        self.stopped: str | None = None  # why reading stopped before the end, as part of a sentence

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel over its height."""
        return self._video.sample_aspect_ratio or Fraction(1)

    @property
    def has_own_times(self) -> bool:
        """Whether times are the frames' own, and not their numbers over the rate."""
        return self._spacing is None

    @property
    def end(self) -> Fraction:
        """End of the last frame in the file's time, which need not start at 0."""
        return self._start + self.seconds

    def timed(self) -> Iterator[Shown]:
        """Yield every frame with its time. Raises StrayTimesError, NoEntryError."""
        for number, frame in enumerate(self._decoded()):
            if frame.is_corrupt:
                self.stopped = "a damaged frame"
                return
            time = self._time(frame, number)
            if self.first is None:
                self.first, self._start = frame, time
            elif (frame.width, frame.height) != (self.first.width, self.first.height):
                self.stopped = "its size changes"
                return
            time -= self._start
            if self._last_time is not None and time <= self._last_time:
                if time < self._last_time:
                    raise StrayTimesError(f"is {self._container_name} whose times go back at frame {number}")
                self.num_dropped += 1
                continue
            self._count(frame, time)
            yield Shown(frame, time, self._last_ticks, self.num_dropped)

    def skip_to(self, time: Fraction) -> None:
        """Leave out frames before the key frame that is the last one at or before `time`, where that can be told.

        `num_skips` counts the gaps.
        """
        if self._spacing is None and not self._is_avi and self._decoder is None:
            assert self._video.time_base is not None
            self._skip_target = int((self._start + time) // self._video.time_base)

    def awaits_earlier(self, first_ticks: int) -> bool:
        """Return whether a frame that is still to come may lie between the frame of `first_ticks` and the last one.

        Packets are read in the order of decoding, so those of all frames that were shown before have been read. Where
        one of them lies before the last frame, and its frame has not come, the times may be those of decoding.
        """
        if self._spacing is not None or not self._video.codec_context.has_b_frames:
            return False
        return any(first_ticks < ticks < self._last_ticks for ticks in self._undecoded)

    def _time(self, frame: av.VideoFrame, number: int) -> Fraction:
        if self._spacing is not None:
            return number * self._spacing
        if self._is_avi and self._video.codec_context.has_b_frames:
            raise StrayTimesError(f"is {self._container_name} with reordered frames, whose times it does not keep")
        ticks = frame.dts if self._is_avi else frame.pts
        if ticks is None or frame.time_base is None:
            raise StrayTimesError(f"is {self._container_name} without a time for frame {number}")
        self._last_ticks = ticks
        self._undecoded.discard(ticks)
        return ticks * frame.time_base

    def _count(self, frame: av.VideoFrame, time: Fraction) -> None:
        duration = frame.duration * frame.time_base if frame.time_base is not None else Fraction(0)
        if self._last_time is not None:
            duration = duration or time - self._last_time  # several containers do not say how long a frame is shown
        self.facts.count(time)
        self._last_time = time
        self.seconds = time + (self._spacing or duration)

    # -- packets ---------------------------------------------------------------------------------------------------

    def _decoded(self) -> Iterator[av.VideoFrame]:
        decode = self._video.decode if self._decoder is None else self._decoder.decode
        try:
            for packets, entry in self._packets():
                awaited = entry
                if entry is not None:
                    self._video.codec_context.flush_buffers()
                    self._undecoded.clear()
                    self._last_time = None
                    self.num_skips += 1
                for packet in packets:
                    if packet.pts is not None:
                        self._undecoded.add(packet.pts)
                    frames: list[av.VideoFrame] = decode(packet)
                    if awaited is not None:
                        frames, awaited = _behind_entry(frames, awaited)
                    yield from frames
        except av.FFmpegError as error:
            self.stopped = f"damage ({error.strerror})"

    def _packets(self) -> Iterator[tuple[list[av.Packet], int | None]]:
        """Yield packets to be decoded together, with the time of the first where frames were left out before it."""
        held: list[av.Packet] = []
        entry, num_bytes = None, 0
        for packet in self._container.demux(self._video):
            is_entry = False
            if packet.pts is not None:
                is_later = self._latest_ticks is None or packet.pts > self._latest_ticks
                target = self._skip_target
                is_entry = is_later and packet.is_keyframe and target is not None and packet.pts <= target
                self._latest_ticks = packet.pts if is_later else self._latest_ticks
            if is_entry:
                held, entry, num_bytes = [], packet.pts, 0
            held.append(packet)
            num_bytes += packet.size
            # No later packet is shown before this one is decoded.
            if (
                self._skip_target is None
                or packet.pts is None
                or packet.dts is None
                or packet.dts > self._skip_target
                or num_bytes > _MAX_HELD_BYTES
            ):
                self._skip_target = None
                yield held, entry
                held, entry, num_bytes = [], None, 0


def _behind_entry(frames: list[av.VideoFrame], entry: int) -> tuple[list[av.VideoFrame], int | None]:
    """Return the frames from the entry on, and the entry if it has not come; frames shown before it lack their past."""
    for number, frame in enumerate(frames):
        if frame.pts is None or frame.pts > entry or (frame.pts == entry and not frame.key_frame):
            raise NoEntryError
        if frame.pts == entry:
            return frames[number:], None
    return [], entry


def _alpha_decoder(video: av.VideoStream) -> av.VideoCodecContext | None:
    """Return a decoder for transparency beside the packets; None where the usual decoder reads all that there is."""
    name = _ALPHA_DECODERS.get(video.codec_context.name)
    if name is None or video.metadata.get("alpha_mode") != "1":
        return None
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    return decoder
