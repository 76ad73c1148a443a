"""`pomscale evaluate heldout`: the held-out loss of a checkpoint, outside of training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pomscale.config.schema import ValidationConfig
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.world import join_world
from pomscale.errors import InputError
from pomscale.evaluation.heldout import HeldoutLoss, heldout_loss
from pomscale.pretrained import load_pretrained
from pomscale.train import open_dataset, read_in_order


def measure_heldout(
    path: Path,
    *,
    data: str | None,
    num_samples: int | None,
    num_time_bins: int | None,
    weights: Literal["ema", "model"],
    device: str,
) -> HeldoutLoss:
    """Loss of the model at `path`; what is None is taken from the recipe's validation section, or its defaults.

    With the recipe's own settings this is the very figure that training logs as validation/loss.
    Raises InputError if neither `data` nor the recipe names a dataset, or if it does not fit the model.
    """
    model = load_pretrained(path, weights=weights, device=device)
    recipe = model.card.recipe
    if data is None and recipe.validation is None:
        raise InputError(f"{path}: its recipe has no validation section; name a dataset with --data")
    base = recipe.validation or ValidationConfig(path=str(data), every_samples=1)
    changes = {"path": data, "num_samples": num_samples, "num_time_bins": num_time_bins}
    config = base.model_copy(update={key: value for key, value in changes.items() if value is not None})
    dataset = open_dataset(recipe, config.path)
    with join_world(device) as world:
        objective = build_objective(recipe.diffusion)
        return heldout_loss(objective, model, read_in_order(dataset), len(dataset), config, world)
