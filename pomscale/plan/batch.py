"""Share of each GPU in a global batch."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainingConfig, TrainRecipe


@dataclass(frozen=True)
class BatchShare:
    """Work of the GPU with most samples in a step: `num_micro_batches` of at most `micro_batch` samples."""

    micro_batch: int
    num_micro_batches: int


def batch_share(training: TrainingConfig, num_gpus: int) -> BatchShare:
    """Return the largest share, as the loader deals: slices that differ by at most one sample, cut near-evenly."""
    largest_slice = -(-training.global_batch // num_gpus)
    num_micro_batches = 1 if training.micro_batch is None else -(-largest_slice // training.micro_batch)
    return BatchShare(-(-largest_slice // num_micro_batches), num_micro_batches)


def num_times(recipe: TrainRecipe) -> int:
    """Return the number of values of t that a sample is trained with."""
    if isinstance(recipe.model, VideoModelConfig) and recipe.diffusion.time.per_frame_group:
        return recipe.model.num_groups
    return 1
