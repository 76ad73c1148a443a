"""How a global batch falls on GPUs, and what a sample of it is."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainingConfig, TrainRecipe


@dataclass(frozen=True)
class BatchShare:
    """What the GPU with most samples does in a step: `num_micro_batches` of at most `micro_batch` samples."""

    micro_batch: int
    num_micro_batches: int


def batch_share(training: TrainingConfig, num_gpus: int) -> BatchShare:
    """As the loader deals: slices of samples that differ by at most one, cut into near-even micro-batches."""
    largest_slice = -(-training.global_batch // num_gpus)
    num_micro_batches = 1 if training.micro_batch is None else -(-largest_slice // training.micro_batch)
    return BatchShare(-(-largest_slice // num_micro_batches), num_micro_batches)


def num_times(recipe: TrainRecipe) -> int:
    """Values of t that a sample is trained with."""
    if isinstance(recipe.model, VideoModelConfig) and recipe.diffusion.time.per_frame_group:
        return recipe.model.num_groups
    return 1
