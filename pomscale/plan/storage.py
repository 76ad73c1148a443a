"""Bytes on disk that a run needs."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.train import TrainRecipe
from pomscale.plan.memory import state_bytes
from pomscale.plan.model_cost import num_parameters


@dataclass(frozen=True)
class Storage:
    """Bytes on disk at the end of the run, when they are most."""

    checkpoint: int
    num_checkpoints: int
    ema_snapshot: int
    num_ema_snapshots: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.num_checkpoints + self.ema_snapshot * self.num_ema_snapshots


def storage(recipe: TrainRecipe) -> Storage:
    total_samples, config, post_hoc = recipe.training.total_samples, recipe.checkpoint, recipe.ema.post_hoc
    num_made = -(-total_samples // config.every_samples)
    # A new checkpoint is written before an old one is deleted.
    num_kept = config.keep_last + 1 + config.keep_best
    if config.keep_every_samples is not None:
        num_kept += total_samples // config.keep_every_samples
    return Storage(
        checkpoint=state_bytes(recipe),
        num_checkpoints=min(num_kept, num_made),
        ema_snapshot=0 if post_hoc is None else 4 * num_parameters(recipe.model) * len(post_hoc.widths),
        num_ema_snapshots=0 if post_hoc is None else -(-total_samples // post_hoc.every_samples),
    )
