"""Pictures and clips of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from pomscale.base.files import atomic_write, make_folder

if TYPE_CHECKING:
    from pomscale.media.mp4 import Mp4Stream

_SMALLEST_TILE = 32  # pixels; smaller pictures are enlarged by whole factors, so that their pixels stay visible
_GAP = 2

NUM_SHEET_COLUMNS = 8
"""Frames that a contact sheet shows of a clip."""


def save_grid(images: Tensor | np.ndarray, path: Path, num_columns: int) -> None:
    """Writes images (b, 1|3, h, w) with values in [0, 1] into one PNG, row by row, on white.

    PomscaleError if it cannot be written.
    """
    make_folder(path.parent)
    grid = _tiled(to_bytes(images)[:, :, None], num_columns, _GAP)[0]
    with atomic_write(path) as stream:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(stream, format="PNG")


def save_clips(clips: Tensor, path_mp4: Path, path_sheet: Path, *, num_columns: int, fps: float) -> None:
    """Writes clips (b, 1|3, f, h, w) with values in [0, 1] into one mp4, side by side, and a contact sheet of them.

    InputError if PyAV is not installed, PomscaleError if a file cannot be written.
    """
    with open_clips(path_mp4, fps, num_columns) as writer:
        writer.write(clips)
    sheet = ContactSheet(clips.shape[2])
    sheet.add(clips)
    sheet.save(path_sheet)


def check_clips_can_be_written() -> None:
    """InputError if PyAV is not installed: better at the start than after hours."""
    import pomscale.media.mp4  # noqa: PLC0415, F401


class ClipWriter:
    """Clips into one mp4 while they grow. A clip alone fills the frame; several are laid out row by row, on white."""

    def __init__(self, stream: Mp4Stream, num_columns: int) -> None:
        self._stream, self._num_columns = stream, num_columns

    def write(self, clips: Tensor) -> None:
        """The next frames of all clips: (b, 1|3, f, h, w) with values in [0, 1]; f may be any number, and 0."""
        frames = _tiled(to_bytes(clips), self._num_columns, _GAP if len(clips) > 1 else 0)
        self._stream.write(np.broadcast_to(frames, (*frames.shape[:3], 3)))


@contextmanager
def open_clips(path: Path, fps: float, num_columns: int = 1) -> Iterator[ClipWriter]:
    """A writer of `path`, which is there, whole, as soon as the block ends without an error; raises as `save_clips`.

    If the process is killed meanwhile, what it has written lies beside it, in a file *.tmp, and can be played.
    """
    from pomscale.media.mp4 import open_mp4  # noqa: PLC0415  # PyAV is optional

    make_folder(path.parent)
    with open_mp4(path, fps) as stream:
        yield ClipWriter(stream, num_columns)


class ContactSheet:
    """A row per clip: frames of it, evenly spaced from first to last. Of a growing clip it keeps these alone."""

    def __init__(self, num_frames: int, num_columns: int = NUM_SHEET_COLUMNS) -> None:
        """For clips of `num_frames` in all; shorter ones than `num_columns` are shown whole."""
        self._shown = np.linspace(0, num_frames - 1, min(num_columns, num_frames)).round().astype(int)
        self._columns: list[np.ndarray] = []
        self._num_added = 0

    def add(self, clips: Tensor) -> None:
        """The next frames of all clips: (b, 1|3, f, h, w) with values in [0, 1]."""
        here = self._shown - self._num_added
        self._columns += [to_bytes(clips[:, :, frame]) for frame in here if 0 <= frame < clips.shape[2]]
        self._num_added += clips.shape[2]

    def save(self, path: Path) -> None:
        """Once all frames are added. PomscaleError if it cannot be written."""
        columns = np.stack(self._columns, axis=1)
        save_grid(columns.reshape(-1, *columns.shape[2:]), path, len(self._columns))


def to_bytes(images: Tensor | np.ndarray) -> np.ndarray:
    """Values in [0, 1], as uint8 of the same shape. Bytes are left as they are."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    return array if array.dtype == np.uint8 else np.rint(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _tiled(clips: np.ndarray, num_columns: int, gap: int) -> np.ndarray:
    """uint8 clips (b c f h w) -> frames (f H W c) that show all of them, `gap` white pixels around each."""
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
