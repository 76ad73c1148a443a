"""Encode clips as mp4 files: H.264 in yuv420p, which every browser plays. A thin adapter on PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pomscale.base.errors import PomscaleError
from pomscale.base.files import atomic_write
from pomscale.media.pyav import Colorspace, av

# The file has fragments while it is written, so that the FILE.*.tmp of a killed process can be played; once closed it
# is an ordinary file, in which players can seek.
_CONTAINER_OPTIONS = {"movflags": "+hybrid_fragmented+frag_keyframe"}

# Seconds from one key frame, and so one fragment, to the next.
_KEY_INTERVAL = 2

_CRF = 16
"""Constant rate factor: 0 is lossless, 18 is said to look so, 23 is x264's own default."""


class Mp4Stream:
    """Writes frames of one size into an open file.

    The same frames make the same clip to the eye, but not always to the byte: of frames under some 50 pixels x264
    compresses a few in a thousand differently (core 165, its mbtree with vector instructions). Without mbtree they
    never differed, but clips grow by a third and more, so it stays. Save clips as npz to compare them exactly.
    """

    def __init__(self, container: av.container.OutputContainer, fps: float) -> None:
        self._container, self._rate = container, Fraction(fps).limit_denominator(1001)
        self._stream: av.VideoStream | None = None
        self._num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Write frames (f, h, w, 3) uint8.

        A side of odd length gets one more white pixel, since pairs of pixels share their colour.
        """
        frames = np.pad(
            frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), constant_values=255
        )
        if self._stream is None:
            self._stream = self._open(*frames.shape[1:3])
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = self._num_frames, 1 / self._rate
            self._num_frames += 1
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write the frames that the encoder still holds back."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))

    def _open(self, height: int, width: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": str(_CRF)})
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        # Stated, since players otherwise guess from the size, and take large frames for BT.709.
        stream.codec_context.colorspace = Colorspace.ITU601
        # By default as many as there are cores, with buffers for each: too many where many clips are written at once,
        # and the file would depend on the machine.
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = max(1, round(_KEY_INTERVAL * self._rate))
        return stream


@contextmanager
def open_mp4(path: Path, fps: float) -> Iterator[Mp4Stream]:
    """Open a stream into `path`, which exists once the block ends without an error. Raises as `atomic_write`."""
    with atomic_write(path) as file, mp4_into(file, fps) as stream:
        yield stream


@contextmanager
def mp4_into(file: BinaryIO, fps: float) -> Iterator[Mp4Stream]:
    """Open a stream into a seekable file, which is a whole mp4 once the block ends without an error."""
    container = av.open(file, "w", format="mp4", container_options=_CONTAINER_OPTIONS)
    stream = Mp4Stream(container, fps)
    try:
        yield stream
        stream.finish()
        container.close()
    except BaseException:
        # Closing writes the rest to a file that is deleted, and fails again where the disk is full.
        with suppress(av.FFmpegError, PomscaleError):
            container.close()
        raise


def write_grey_clip(path: Path, frames: np.ndarray, *, fps: int, crf: int) -> None:
    """Write grey frames (f, h, w) uint8 to an mp4 of constant rate factor `crf`. The same frames give the same bytes.

    The options of `Mp4Stream` are left out: datasets are made from these files, and their bytes must not change.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf)})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"  # which every player takes
        stream.codec_context.thread_count = 1  # the bytes depend on it
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="gray")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
