"""Open video files, and read what they state of their length and of the distance of their frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import BinaryIO

from pomscale.media import UnreadableMediaError
from pomscale.media.pyav import av

# Containers, as FFmpeg names them. Not playlists and the like: those make FFmpeg open further files and addresses.
AVI = "avi"
_FORMATS = f"mov,matroska,webm,{AVI},mpegts,mpeg,flv,asf,ogg"


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
    if container.format.name == AVI and video.frames and video.average_rate:
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
