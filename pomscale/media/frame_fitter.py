"""Scale, cut and turn the decoded frames of a clip.

A frame is scaled to just cover the target and its centre cut out, in the shape it is shown in: turned and mirrored as
the display matrix says, with pixels that need not be square. swscale does it from the decoder's colours in one go, in
its accurate and bit-exact mode: the fast one is up to two grey levels off, and differs between processors. "area" is
then the exact mean over the area (tests/unit/media/test_filters.py).

**Colours** are those of the frame's tags. Frames without a tag are read as players do: by BT.709 if they are wider than
1279 or higher than 576 pixels, else by BT.601; swscale would take BT.601 for all. **Transparency** is laid on white
before a frame is scaled, as that of pictures is.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from pomscale.media import Filter, UnreadableMediaError
from pomscale.media.pyav import Colorspace, Interpolation, VideoReformatter, av

# Names of swscale for 1 channel, from black 0 to white 255, and 3.
_FORMATS_OUT = {1: "gray", 3: "rgb24"}

# Wider or higher ones are no pictures, and to cover a target they would take any amount of memory.
_MAX_ASPECT = 16

_ACCURATE = (
    Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_SCALERS: dict[Filter, int] = {"area": Interpolation.AREA | _ACCURATE, "lanczos": Interpolation.LANCZOS | _ACCURATE}

# Matrices by their number in the tag (ITU-T H.273) that swscale knows, and the number of an absent tag.
_KNOWN_MATRICES = {0, 1, 4, 5, 6, 7, 9}
_UNTAGGED = 2

# Size of standard definition at most: 720x576; sizes between are not in use.
_MAX_SD_WIDTH = 1279
_MAX_SD_HEIGHT = 576


class FrameFitter:
    """Scales, cuts and turns the frames of one clip."""

    def __init__(self, frame: av.VideoFrame, pixel_aspect: Fraction, filter: Filter, num_channels: int) -> None:
        self._transposed, self._flipped_rows, self._flipped_columns = _orientation(frame)
        self._height, self._width = float(frame.height), float(frame.width * pixel_aspect)
        if max(self._height / self._width, self._width / self._height) > _MAX_ASPECT:
            raise UnreadableMediaError(f"is shown as {self._width:.0f}x{self._height:.0f}: too narrow a strip")
        self._scaler, self._flattener = VideoReformatter(), VideoReformatter()
        self._interpolation = _SCALERS[filter]
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
        if _is_transparent(frame):
            frame = self._on_white(frame)
        cover = self._scaler.reformat(
            frame,
            cover_width,
            cover_height,
            self._format,
            src_colorspace=_matrix(frame),
            interpolation=self._interpolation,
            threads=1,
        ).to_ndarray()
        cover = cover.reshape(cover_height, cover_width, self._num_channels)
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        pixels = cover[top : top + height, left : left + width]
        if self._transposed:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if self._flipped_rows else 1, :: -1 if self._flipped_columns else 1]
        return np.ascontiguousarray(pixels)

    def _on_white(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame laid on white, without transparency."""
        rgba = self._flattener.reformat(
            frame, format="rgba", src_colorspace=_matrix(frame), interpolation=_ACCURATE, threads=1
        ).to_ndarray()
        alpha = rgba[..., 3:].astype(np.uint16)
        flat = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return av.VideoFrame.from_ndarray(flat.astype(np.uint8), format="rgb24")


def _is_transparent(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _matrix(frame: av.VideoFrame) -> int:
    """Return the number of the matrix between the frame's colours and RGB.

    Raises UnreadableMediaError for a tag that swscale does not know: it would take it for BT.601.
    """
    tag = int(frame.colorspace)
    if tag in _KNOWN_MATRICES:
        return tag
    if tag != _UNTAGGED:
        raise UnreadableMediaError(
            f"its colours have the matrix {tag} of ITU-T H.273, which is not read; write it anew, for example with: "
            f"ffmpeg -i OLD -vf scale=out_color_matrix=bt709 NEW.mp4"
        )
    is_hd = frame.width > _MAX_SD_WIDTH or frame.height > _MAX_SD_HEIGHT
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


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
