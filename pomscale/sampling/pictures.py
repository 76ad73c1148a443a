"""`pomscale sample` for a model of pictures: a PNG grid, and an npz file for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pomscale.base.files import atomic_write, check_can_be_written, check_suffix
from pomscale.diffusion.options import SamplingOptions
from pomscale.media.sheets import save_grid, to_bytes
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedModel
from pomscale.sampling.api import decode, sample_latents
from pomscale.sampling.on_ranks import grid_classes


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """The pictures to make.

    Attributes:
        options: Options of sampling.
        num_each: Pictures per class.
        seed: Picture i has seed + i.
        batch: Most pictures at once; it does not change them.
        guide: The weaker model of autoguidance.
    """

    options: SamplingOptions
    num_each: int = 8
    seed: int = 0
    batch: int = 64
    guide: PretrainedModel | None = None


def write_pictures(
    model: PretrainedDiPoM, classes: Sequence[int] | None, request: PictureRequest, *, out: Path, npz: Path | None
) -> None:
    """Sample one row of pictures per class and write them.

    Args:
        model: The model.
        classes: Class ids; None = the classes of the grid in the model's recipe.
        request: The pictures to make.
        out: PNG of the grid.
        npz: File for images (uint8 n h w c), classes and seeds; None = not written.

    Raises:
        InputError: `out` or `npz` is a folder, has the suffix of another format, or its folder cannot be made. This is
            checked before any work.
    """
    for path, suffix in ((out, ".png"), (npz, ".npz")):
        if path is not None:
            check_can_be_written(path)
            check_suffix(path, suffix)
    if classes is None:
        classes = sorted(set(grid_classes(model.card.sampling, model.config.num_classes)))
    num_each = request.num_each
    condition = [c for c in classes for _ in range(num_each)]
    seeds = range(request.seed, request.seed + len(condition))
    latents = sample_latents(
        model, condition, seeds, request.options, batch=request.batch, show_progress=True, guide=request.guide
    )
    images = decode(model, latents).clamp(0, 1).cpu()
    save_grid(images, out, num_each)
    print(f"wrote {out}: {len(classes)} classes x {num_each}")
    if npz is not None:
        pixels = to_bytes(images).transpose(0, 2, 3, 1)
        with atomic_write(npz) as stream:
            np.savez_compressed(stream, images=pixels, classes=np.array(condition), seeds=np.array(seeds))
        print(f"wrote {npz}: images {pixels.shape} uint8, classes, seeds")
