"""`pomscale sample` for a model of pictures: a PNG grid, and an npz file for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pomscale.base.errors import InputError
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
        num_each: Pictures per class or prompt.
        seed: Picture i has seed + i.
        batch: Most pictures at once; it does not change them.
        guide: The weaker model of autoguidance.
        size: (height, width) in pixels, for a model of texts; None = that of its recipe.
    """

    options: SamplingOptions
    num_each: int = 8
    seed: int = 0
    batch: int = 64
    guide: PretrainedModel | None = None
    size: tuple[int, int] | None = None


def write_pictures(
    model: PretrainedDiPoM,
    rows: Sequence[int] | Sequence[str] | None,
    request: PictureRequest,
    *,
    out: Path,
    npz: Path | None,
) -> None:
    """Sample pictures and write them, in one row for each class or prompt.

    Args:
        model: The model.
        rows: Class ids, or prompts for a model of texts; None = those of the grid in the model's recipe.
        request: The pictures to make.
        out: PNG of the grid.
        npz: File for images (uint8 n h w c), classes or prompts, and seeds; None = not written.

    Raises:
        InputError: `out` or `npz` is a folder, has the suffix of another format, or its folder cannot be made, or there
            is no prompt. This is checked before any work.
    """
    for path, suffix in ((out, ".png"), (npz, ".npz")):
        if path is not None:
            check_can_be_written(path)
            check_suffix(path, suffix)
    rows = _rows_of_recipe(model) if rows is None else rows
    num_each, what = request.num_each, "classes" if model.config.text_dim is None else "prompts"
    condition = [row for row in rows for _ in range(num_each)]
    seeds = range(request.seed, request.seed + len(condition))
    latents = sample_latents(
        model,
        condition,  # type: ignore[arg-type]  # all of one kind, as `rows`
        seeds,
        request.options,
        batch=request.batch,
        show_progress=True,
        guide=request.guide,
        size=None if request.size is None else latent_size(model, request.size),
    )
    images = decode(model, latents).clamp(0, 1).cpu()
    save_grid(images, out, num_each)
    print(f"wrote {out}: {len(rows)} {what} x {num_each}")
    if npz is not None:
        pixels = to_bytes(images).transpose(0, 2, 3, 1)
        arrays = {"images": pixels, what: np.array(condition), "seeds": np.array(seeds)}
        with atomic_write(npz) as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # no array is allow_pickle
        print(f"wrote {npz}: images {pixels.shape} uint8, {what}, seeds")


def _rows_of_recipe(model: PretrainedDiPoM) -> Sequence[int] | Sequence[str]:
    sampling, num_classes = model.card.sampling, model.config.num_classes
    if num_classes is not None:
        return sorted(set(grid_classes(sampling, num_classes)))
    if not sampling.prompts:
        raise InputError("say with --prompt what the pictures are to show; the model's recipe has no sampling.prompts")
    return sampling.prompts


def latent_size(model: PretrainedDiPoM, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the latents of pictures of `size` in pixels. InputError if they do not fit."""
    try:
        _, height, width = model.codec.latent_shape(*size)
    except InputError as error:
        raise InputError(f"pictures of {size[0]}x{size[1]} pixels: {error}") from error
    return height, width
