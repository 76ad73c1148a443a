"""Real video files, written with PyAV, whose frames show their own number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_NUM_BITS = 10


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: the bits of `number` as black and white rows, so that columns may be cut away."""
    bits = np.array([number >> bit & 1 for bit in range(_NUM_BITS)], np.uint8)
    rows = bits[np.arange(height) * _NUM_BITS // height] * 255
    return np.broadcast_to(rows[:, None, None], (height, width, 3)).copy()


def read_number(frame: np.ndarray) -> int:
    """The number that `numbered_frame` wrote, after compression and resizing."""
    middles = ((np.arange(_NUM_BITS) + 0.5) * frame.shape[0] / _NUM_BITS).astype(int)
    return sum(int(frame[row].mean() > 127) << bit for bit, row in enumerate(middles))


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: float | Fraction = 30,
    *,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    time_base: Fraction = Fraction(
        1, 30_000
    ),  # the frames of all usual rates lie on it, and MPEG-4 allows no finer one
    arrange: Callable[[list[av.Packet]], list[av.Packet]] = lambda packets: packets,
    pix_fmt: str = "yuv420p",
    display_matrix: tuple[int, int, int, int] | None = None,
    sample_aspect_ratio: Fraction | None = None,
) -> Path:
    """One video stream of `frames` (h, w, 3) uint8. `times`: presentation times in seconds, else constant `fps`.

    `arrange` changes the packets before they are written. `display_matrix` (a, b, c, d) of 1, 0 and -1 puts pixel
    (x, y) at (a x + c y, b x + d y).
    """
    frames = list(frames)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        if display_matrix is not None:
            a, b, c, d = (number << 16 for number in display_matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        packets: list[av.Packet] = []
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            seconds = number / rate if times is None else Fraction(times[number])
            frame.pts, frame.time_base = round(seconds / time_base), time_base
            packets += stream.encode(frame)
        for packet in arrange([*packets, *stream.encode(None)]):
            packet.stream = stream
            container.mux(packet)
    return path
