"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

_SMALLEST_TILE = 32  # pixels; smaller pictures are enlarged by whole factors, so that their pixels stay visible
_GAP = 2


def save_grid(images: Tensor | np.ndarray, path: Path, num_columns: int) -> None:
    """Writes images (b, 1|3, h, w) with values in [0, 1] into one PNG, row by row, on white."""
    array = images.detach().cpu().float().numpy() if isinstance(images, Tensor) else images
    pixels = np.rint(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    count, channels, height, width = pixels.shape
    factor = max(1, -(-_SMALLEST_TILE // min(height, width)))
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = height * factor + _GAP, width * factor + _GAP
    num_rows = -(-count // num_columns)
    grid = np.full((num_rows * height + _GAP, num_columns * width + _GAP, channels), 255, np.uint8)
    for i, tile in enumerate(pixels):
        top, left = (i // num_columns) * height + _GAP, (i % num_columns) * width + _GAP
        grid[top : top + tile.shape[1], left : left + tile.shape[2]] = tile.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, format="PNG")
