"""`pomscale sample`: pictures of a trained model into a PNG grid, and into an npz for measuring."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pomscale.base.files import atomic_write, check_can_be_written
from pomscale.config.sampling import SamplerName
from pomscale.media.sheets import save_grid
from pomscale.pretrained.load import PretrainedDiPoM, decode, sample
from pomscale.sampling.on_ranks import grid_classes


def draw_pictures(
    model: PretrainedDiPoM,
    classes: list[int] | None,
    *,
    num_each: int,
    seed: int,
    sampler: SamplerName | None,
    steps: int | None,
    guidance: float | None,
    batch: int,
    out: Path,
    npz: Path | None,
) -> None:
    """One row of pictures per class; picture i has seed + i. None means what the model's recipe says.

    Raises InputError if `out` or `npz` is a folder, or theirs cannot be made, before any work.
    """
    for path in filter(None, (out, npz)):
        check_can_be_written(path)
    defaults = model.card.sampling
    if classes is None:
        classes = sorted(set(grid_classes(defaults, model.config.num_classes)))
    condition = [c for c in classes for _ in range(num_each)]
    seeds = range(seed, seed + len(condition))
    latents = sample(
        model,
        condition,
        seeds=seeds,
        sampler=sampler or defaults.sampler,
        steps=steps or defaults.num_steps,
        guidance=defaults.guidance if guidance is None else guidance,
        batch=batch,
        show_progress=True,
    )
    images = decode(model, latents).clamp(0, 1).cpu()
    save_grid(images, out, num_each)
    print(f"wrote {out}: {len(classes)} classes x {num_each}")
    if npz is not None:
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        with atomic_write(npz) as stream:
            np.savez_compressed(stream, images=pixels, classes=np.array(condition), seeds=np.array(seeds))
        print(f"wrote {npz}: images {pixels.shape} uint8, classes, seeds")
