"""Write pictures and clips for people: PNG grids, contact sheets, and mp4 files that show several clips."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pomscale.base.files import atomic_write, make_folder

if TYPE_CHECKING:
    from pomscale.media.mp4 import Mp4Stream

_SMALLEST_TILE = 32  # pixels; smaller pictures are enlarged by whole factors, so that their pixels stay visible
_GAP = 2

# The sheet with captions: white pixels around frames, font, and lines per caption.
_CAPTION_GAP = 4
_FONT_SIZE = 14
_CAPTION_LINES = 2

NUM_SHEET_COLUMNS = 8
"""Number of frames that a contact sheet shows of each clip."""


def save_grid(images: Tensor | np.ndarray, path: Path, num_columns: int) -> None:
    """Write images (b, 1|3, h, w) with values in [0, 1] into one PNG, row by row, on white.

    Raises PomscaleError if it cannot be written.
    """
    make_folder(path.parent)
    grid = _tiled(to_bytes(images)[:, :, None], num_columns, _GAP)[0]
    with atomic_write(path) as stream:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(stream, format="PNG")


def save_clips(clips: Tensor, path_mp4: Path, path_sheet: Path, *, num_columns: int, fps: float) -> None:
    """Write clips (b, 1|3, f, h, w) with values in [0, 1] into one mp4, side by side, and a contact sheet of them.

    Raises InputError if PyAV is not installed, PomscaleError if a file cannot be written.
    """
    with open_clips(path_mp4, fps, num_columns) as writer:
        writer.write(clips)
    sheet = ContactSheet(clips.shape[2])
    sheet.add(clips)
    sheet.save(path_sheet)


def check_clips_can_be_written() -> None:
    """Raise InputError if PyAV is not installed. Runs call it at their start, hours before they write a clip."""
    import pomscale.media.mp4  # noqa: PLC0415, F401


class ClipWriter:
    """Writes growing clips into one mp4. A clip alone fills the frame; several are laid out row by row, on white."""

    def __init__(self, stream: Mp4Stream, num_columns: int) -> None:
        self._stream, self._num_columns = stream, num_columns

    def write(self, clips: Tensor) -> None:
        """Write the next frames of all clips: (b, 1|3, f, h, w) with values in [0, 1]; f may be any number, and 0."""
        frames = _tiled(to_bytes(clips), self._num_columns, _GAP if len(clips) > 1 else 0)
        self._stream.write(np.broadcast_to(frames, (*frames.shape[:3], 3)))


@contextmanager
def open_clips(path: Path, fps: float, num_columns: int = 1) -> Iterator[ClipWriter]:
    """Open a writer of `path`, which exists, whole, once the block ends without an error. Raises as `save_clips`.

    If the process is killed meanwhile, the frames so far remain in a file *.tmp beside it, which can be played.
    """
    from pomscale.media.mp4 import open_mp4  # noqa: PLC0415  # PyAV is optional

    make_folder(path.parent)
    with open_mp4(path, fps) as stream:
        yield ClipWriter(stream, num_columns)


class ContactSheet:
    """A row per clip with frames of it, evenly spaced from first to last. Only these are kept of growing clips."""

    def __init__(self, num_frames: int, num_columns: int = NUM_SHEET_COLUMNS) -> None:
        """Prepare a sheet of clips of `num_frames` in all; clips shorter than `num_columns` are shown whole."""
        self._shown = np.linspace(0, num_frames - 1, min(num_columns, num_frames)).round().astype(int)
        self._columns: list[np.ndarray] = []
        self._num_added = 0

    def add(self, clips: Tensor) -> None:
        """Add the next frames of all clips: (b, 1|3, f, h, w) with values in [0, 1]."""
        here = self._shown - self._num_added
        self._columns += [to_bytes(clips[:, :, frame]) for frame in here if 0 <= frame < clips.shape[2]]
        self._num_added += clips.shape[2]

    def save(self, path: Path) -> None:
        """Write the sheet, once all frames are added. Raises PomscaleError if it cannot be written."""
        columns = np.stack(self._columns, axis=1)
        save_grid(columns.reshape(-1, *columns.shape[2:]), path, len(self._columns))


def pad_to_largest(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures (c, h, w) of several sizes in the middle of white ones (b, c, H, W) of the largest size."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = np.ones((len(pictures), pictures[0].shape[0], height, width), np.float32)
    for target, picture in zip(padded, pictures, strict=True):
        top, left = (height - picture.shape[1]) // 2, (width - picture.shape[2]) // 2
        target[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return padded


def save_captioned_clips(clips: Sequence[np.ndarray], captions: Sequence[str], path: Path, num_columns: int) -> None:
    """Write a PNG with one row per clip (3, f, h, w): evenly spaced frames, and the caption below.

    First and last frame are among the `num_columns` that are shown.
    """
    import matplotlib  # noqa: PLC0415  only for its font: Pillow's own has ASCII alone, this one most of Europe's letters

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)
    gap, line_height = _CAPTION_GAP, math.ceil(1.3 * _FONT_SIZE)
    row_heights = [clip.shape[2] + _CAPTION_LINES * line_height + 2 * gap for clip in clips]
    width = max(num_columns * (clip.shape[3] + gap) + gap for clip in clips)
    sheet = Image.new("RGB", (width, sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for clip, caption, height in zip(clips, captions, row_heights, strict=True):
        frames = np.linspace(0, clip.shape[1] - 1, min(num_columns, clip.shape[1])).round().astype(int)
        for column, frame in enumerate(frames):
            pixels = to_bytes(clip[:, frame]).transpose(1, 2, 0)
            sheet.paste(Image.fromarray(pixels), (gap + column * (clip.shape[3] + gap), top + gap))
        for number, line in enumerate(_wrapped(caption, font, width - 2 * gap)):
            draw.text((gap, top + clip.shape[2] + 1.5 * gap + number * line_height), line, "black", font)
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _wrapped(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a caption into lines, with as many characters in each as the widest letters leave room for."""
    num_characters = max(8, int(width / font.getlength("n")))
    return textwrap.wrap(caption, num_characters, max_lines=_CAPTION_LINES, placeholder=" ...")


def to_bytes(images: Tensor | np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as uint8 of the same shape; bytes are returned as they are."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    return array if array.dtype == np.uint8 else np.rint(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _tiled(clips: np.ndarray, num_columns: int, gap: int) -> np.ndarray:
    """Lay out uint8 clips (b c f h w) in frames (f H W c), with `gap` white pixels around each."""
    count, channels, num_frames, height, width = clips.shape
    factor = max(1, -(-_SMALLEST_TILE // min(height, width)))
    height, width = height * factor + gap, width * factor + gap
    num_rows = -(-count // num_columns)
    frames = np.full((num_frames, num_rows * height + gap, num_columns * width + gap, channels), 255, np.uint8)
    for number, clip in enumerate(clips):
        top, left = (number // num_columns) * height + gap, (number % num_columns) * width + gap
        tile = clip.transpose(1, 2, 3, 0).repeat(factor, axis=1).repeat(factor, axis=2)
        frames[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return frames
