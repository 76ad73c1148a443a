"""Share of each GPU in a global batch, and in the tokens of a sample."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe


@dataclass(frozen=True)
class BatchShare:
    """Work of the GPU with most samples in a step: `num_micro_batches` of at most `micro_batch` samples.

    Packed samples are counted in samples of `model.latent_shape`, rounded up.
    GPUs that share the tokens of their samples (`mesh.sp`) have the same share.
    """

    micro_batch: int
    num_micro_batches: int


def largest_slice(recipe: TrainRecipe, num_gpus: int) -> int:
    """Return the most samples that a GPU has of a global batch, or of whose tokens it has a part."""
    if recipe.training.global_tokens is not None:
        return -(-_tokens_of_gpu(recipe, num_gpus) // recipe.model.num_tokens)
    return -(-recipe.samples_per_step // (num_gpus // recipe.mesh.sp))


def _tokens_of_gpu(recipe: TrainRecipe, num_gpus: int) -> int:
    """Return the most tokens that a GPU has of a packed step, whose samples are dealt evenly."""
    assert recipe.training.global_tokens is not None
    return -(-recipe.training.global_tokens // num_gpus)


def batch_share(recipe: TrainRecipe, num_gpus: int) -> BatchShare:
    """Return the largest share, as the loader deals: slices that differ by at most one sample, cut near-evenly."""
    training, largest = recipe.training, largest_slice(recipe, num_gpus)
    if training.global_tokens is not None:
        tokens = _tokens_of_gpu(recipe, num_gpus)
        number = 1 if training.micro_tokens is None else -(-tokens // training.micro_tokens)
        return BatchShare(-(-tokens // (number * recipe.model.num_tokens)), number)
    num_micro_batches = 1 if training.micro_batch is None else -(-largest // training.micro_batch)
    return BatchShare(-(-largest // num_micro_batches), num_micro_batches)


def with_micro_batch(recipe: TrainRecipe, size: int) -> dict[str, int]:
    """Return the change of a recipe, by key, that makes its micro-batches at most `size` samples."""
    if recipe.training.global_tokens is not None:
        return {"training.micro_tokens": size * recipe.model.num_tokens}
    return {"training.micro_batch": size}


def num_times(recipe: TrainRecipe) -> int:
    """Return the number of values of t that a sample is trained with."""
    if isinstance(recipe.model, VideoModelConfig) and recipe.diffusion.time.per_frame_group:
        return recipe.model.num_groups
    return 1


def with_local_tokens(recipe: TrainRecipe) -> TrainRecipe:
    """Return the recipe with samples of the tokens of one GPU, where `mesh.sp` of them share a sample's.

    The patches are laid out in a row, those of clips in as many rows as the GPU has whole frame groups; their number is
    rounded up.
    """
    model, sp = recipe.model, recipe.mesh.sp
    if sp == 1:
        return recipe
    num_tokens, size = -(-model.num_tokens // sp), model.patch_size
    shape: tuple[int, ...] = (model.latent_shape[0], size, size * num_tokens)
    if isinstance(model, VideoModelConfig):
        groups = -(-model.num_groups // sp)
        shape = (shape[0], groups * model.patch_frames, size, size * -(-num_tokens // groups))
    return recipe.model_copy(update={"model": model.model_copy(update={"latent_shape": shape})})
