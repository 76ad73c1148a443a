"""Look at a video file before it is measured."""

from __future__ import annotations

from typing import BinaryIO

from pomscale.evaluation.generated.clip_files import ClipFiles, Look, same_rate
from pomscale.media import UnreadableMediaError
from pomscale.media.clip_frames import FrameReader, StrayTimesError
from pomscale.media.clips import as_unreadable
from pomscale.media.frame_fitter import FrameFitter
from pomscale.media.video_file import open_video


def look(stream: BinaryIO, num_frames: int) -> Look:
    """Return size and rate of a clip from its first frames, at least two of them.

    Raises UnreadableMediaError if it is no video, or its frames have no usable times.
    """
    fitter: FrameFitter | None = None
    with as_unreadable(), open_video(stream) as (container, video):
        reader = FrameReader(container, video)
        try:
            for shown in reader.timed():
                fitter = fitter or FrameFitter(shown.frame, reader.pixel_aspect, "area", ClipFiles.num_channels)
                if reader.facts.num_frames > max(num_frames, 2):
                    break
        except StrayTimesError as error:
            raise UnreadableMediaError(f"{error}, so its rate is unknown; say it with --fps") from error
        rate = reader.facts.rate
        if rate is not None and video.average_rate is not None and same_rate(rate, float(video.average_rate)):
            rate = float(video.average_rate)  # other than the mean of a few frames, it is not rounded
    if fitter is None or rate is None:
        raise UnreadableMediaError("has fewer than two frames, so its rate is unknown; say it with --fps")
    height, width = map(round, fitter.shown)
    return Look((height, width), rate)
