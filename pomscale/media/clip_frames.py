"""Read the frames of a video file in the order in which they are shown, each with its time.

**Times** are those of the frames, as long as they increase. A frame with the time of the one before it is dropped.

AVI keeps the times of decoding alone. Those are the times of showing as long as frames are not reordered. Where they
are, and where times go back or are missing (files that were copied out of an AVI), the decoder has the right order, and
only the times are wrong. If the packets of such a file are evenly spaced, a frame's time is its number times their
distance (`even_spacing`); else there is no way to know it, and the clip cannot be used.

**Ends.** Reading stops at damage, or where the frame size changes. A file that was cut off looks like a shorter one to
most demuxers, so what was read is compared with the length that the file states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO

from pomscale.media import UnreadableMediaError
from pomscale.media.pyav import av

# Containers, as FFmpeg names them. Not playlists and the like: those make FFmpeg open further files and addresses.
_AVI = "avi"
_FORMATS = f"mov,matroska,webm,{_AVI},mpegts,mpeg,flv,asf,ogg"

# Frames by which a codec may reorder: the largest buffer of H.264 and HEVC is 16 frames.
_MAX_REORDERED = 32

# Decoders of VP8 and VP9 that read transparency, which Matroska and WebM keep beside the packets.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class StrayTimesError(Exception):
    """The frames' times go back or are missing. The message is a reason of UnreadableMediaError without its cause."""


@contextmanager
def open_video(stream: BinaryIO) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file from its start. Raises UnreadableMediaError if it has no video or an unknown codec."""
    stream.seek(0)
    with av.open(stream, "r", options={"format_whitelist": _FORMATS}, metadata_errors="ignore") as container:
        video = container.streams.best("video")
        if not isinstance(video, av.VideoStream):
            raise UnreadableMediaError("has no video stream")
        if video.codec_context is None:
            raise UnreadableMediaError("its codec is unknown")
        # The recipe's threads decode a clip each; more inside each of them would only get in their way.
        video.thread_count = 1
        yield container, video


class FrameReader:
    """The frames of a video with their times, until it ends or is damaged."""

    def __init__(
        self, container: av.container.InputContainer, video: av.VideoStream, spacing: Fraction | None = None
    ) -> None:
        """Begin to read. `spacing` is the seconds between frames where their own times are not to be used."""
        self._container, self._video, self._spacing = container, video, spacing
        self._container_name = container.format.long_name
        self._is_avi = container.format.name == _AVI
        self._decoder = _alpha_decoder(video)
        self._first: av.VideoFrame | None = None
        self._gaps: tuple[Fraction, Fraction] | None = None  # the shortest and the longest between frames
        self._start = Fraction(0)
        self._last_time = Fraction(0)
        self._first_ticks = self._last_ticks = 0
        self._undecoded: set[int] = set()  # times of packets whose frames have not come yet
        self._num_awaited = 0
        self.num_frames = 0
        self.num_dropped = 0
        self.seconds = Fraction(0)  # duration of the frames so far, the last one included
        self.stopped: str | None = None  # why reading stopped before the end, as part of a sentence

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel over its height."""
        return self._video.sample_aspect_ratio or Fraction(1)

    @property
    def end(self) -> Fraction:
        """End of the last frame in the file's time, which need not start at 0."""
        return self._start + self.seconds

    def nearest(self, interval: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        """Yield every frame with the time up to which it is the nearest, in seconds after the first frame's.

        The last one counts for half its duration, or until an `interval` before it ends if that is later: so a clip
        that lasts n intervals fills n frames at any rate. Raises StrayTimesError.
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

    def awaits_earlier(self) -> bool:
        """Return whether a frame that is still to come may have an earlier time than the last one.

        Packets are read in the order of decoding, so those of all frames that were shown before have been read. Where
        one of them lies before the last frame, and its frame has not come, the times may be those of decoding.
        """
        if self._spacing is not None or not self._video.codec_context.has_b_frames:
            return False
        self._num_awaited += 1
        return self._num_awaited <= _MAX_REORDERED and any(
            self._first_ticks < ticks < self._last_ticks for ticks in self._undecoded
        )

    def info(self) -> dict[str, Any]:
        """Return the facts of `DecodedClip.info` about the frames that were read."""
        assert self._first is not None
        rate = (self.num_frames - 1) / self._last_time if self._last_time else None
        return {
            "width": self._first.width,
            "height": self._first.height,
            "source_fps": None if rate is None else round(float(rate), 3),
            "num_source_frames": self.num_frames,
            "num_dropped_frames": self.num_dropped,
            "times": "frames" if self._spacing is None else "even",
            # Rounding of times (Matroska: to milliseconds) changes gaps by far less, a dropped frame by more.
            "variable_rate": self._gaps is not None and self._gaps[1] > 1.5 * self._gaps[0],
        }

    def _timed(self) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        for number, frame in enumerate(self._decoded()):
            if frame.is_corrupt:
                self.stopped = "a damaged frame"
                return
            time = self._time(frame, number)
            if self._first is None:
                self._first, self._start, self._first_ticks = frame, time, self._last_ticks
            elif (frame.width, frame.height) != (self._first.width, self._first.height):
                self.stopped = "its size changes"
                return
            elif time - self._start == self._last_time:
                self.num_dropped += 1
                continue
            elif time - self._start < self._last_time:
                raise StrayTimesError(f"is {self._container_name} whose times go back at frame {number}")
            yield frame, time - self._start

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

    def _decoded(self) -> Iterator[av.VideoFrame]:
        decode = self._video.decode if self._decoder is None else self._decoder.decode
        try:
            for packet in self._container.demux(self._video):
                if packet.pts is not None:
                    self._undecoded.add(packet.pts)
                yield from decode(packet)
        except av.FFmpegError as error:
            self.stopped = f"damage ({error.strerror})"

    def _count(self, frame: av.VideoFrame, time: Fraction) -> None:
        duration = frame.duration * frame.time_base if frame.time_base is not None else Fraction(0)
        if self.num_frames:
            gap = time - self._last_time
            shortest, longest = self._gaps or (gap, gap)
            self._gaps = min(shortest, gap), max(longest, gap)
            duration = duration or gap  # several containers do not say how long a frame is shown
        self.num_frames += 1
        self._last_time = time
        self.seconds = time + (self._spacing or duration)


def _alpha_decoder(video: av.VideoStream) -> av.VideoCodecContext | None:
    """Return a decoder for transparency beside the packets; None where the usual decoder reads all that there is."""
    name = _ALPHA_DECODERS.get(video.codec_context.name)
    if name is None or video.metadata.get("alpha_mode") != "1":
        return None
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    return decoder


def even_spacing(stream: BinaryIO, seconds: float) -> Fraction | None:
    """Return the seconds from one frame to the next, if the first `seconds` of packets are evenly spaced.

    The times of decoding tell it, since they are those of showing in another order. They may be rounded to the time
    base. Nothing is decoded.
    """
    with open_video(stream) as (container, video):
        times: list[int] = []
        assert video.time_base is not None
        for packet in container.demux(video):
            if packet.dts is None:
                continue
            times.append(packet.dts)
            if (times[-1] - times[0]) * video.time_base > seconds:
                break
        if len(times) < 3 or times[-1] <= times[0]:
            return None
        distance = Fraction(times[-1] - times[0], len(times) - 1)
        if any(abs(time - times[0] - number * distance) > 1 for number, time in enumerate(times)):
            return None
        return distance * video.time_base


def stated_seconds(container: av.container.InputContainer, video: av.VideoStream) -> tuple[float | None, bool]:
    """Return the duration that a file states, and whether it is the video's own, not that of the longest stream."""
    if container.format.name == _AVI and video.frames and video.average_rate:
        return float(video.frames / video.average_rate), True  # FFmpeg makes its duration fit a file that was cut
    if video.duration is not None and video.time_base is not None:
        return float(video.duration * video.time_base), True
    tag = _tag_seconds(video.metadata.get("DURATION", ""))  # Matroska
    if tag is not None:
        return tag, True
    return (None if container.duration is None else container.duration / av.time_base), False


def _tag_seconds(text: str) -> float | None:
    """Return the seconds of a text such as 00:00:04.000000000; None for any other text."""
    try:
        hours, minutes, seconds = map(float, text.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def seconds_of_all_streams(stream: BinaryIO) -> float:
    """Return the time from the first packet of any stream of a file to the end of the last. Nothing is decoded."""
    start = end = 0.0  # sound may begin before 0, at the delay of its codec
    with open_video(stream) as (container, _):
        try:
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    start = min(start, float(packet.pts * packet.time_base))
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except av.FFmpegError:
            pass  # what lies behind damage does not count
    return end - start
