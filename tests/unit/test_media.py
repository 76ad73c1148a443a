from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pomscale.monitoring.media import save_grid


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_torch", [True, False])
def test_small_pictures_are_enlarged_and_laid_out_row_by_row(tmp_path: Path, channels: int, as_torch: bool) -> None:
    images = np.zeros((5, channels, 8, 8), np.float32)
    images[3] = 1.0
    images[4] = 7.0  # out of range: clipped
    save_grid(torch.from_numpy(images) if as_torch else images, tmp_path / "new" / "grid.png", num_columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape[:2] == (2 * 34 + 2, 3 * 34 + 2)
    centres = [grid[18 + 34 * (i // 3), 18 + 34 * (i % 3)].max() for i in range(6)]
    assert centres == [0, 0, 0, 255, 255, 255]  # the sixth is background


def test_large_pictures_keep_their_size(tmp_path: Path) -> None:
    save_grid(np.zeros((1, 3, 40, 50), np.float32), tmp_path / "grid.png", num_columns=1)
    assert Image.open(tmp_path / "grid.png").size == (54, 44)
