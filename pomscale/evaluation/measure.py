"""`pomscale evaluate heldout`: the held-out loss of a checkpoint, outside of training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pomscale.base.console import warn
from pomscale.base.errors import InputError
from pomscale.checkpoint.store import find_checkpoint, read_meta
from pomscale.config.data import DataConfig
from pomscale.config.train import ValidationConfig
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.world import join_world
from pomscale.evaluation.heldout import HeldoutLoss, heldout_loss
from pomscale.pretrained.load import load_pretrained
from pomscale.shards.schema import read_manifest
from pomscale.training.periodic import open_heldout, read_in_order, shape_sizes


def measure_heldout(
    path: Path,
    *,
    data: str | None,
    text: str | None,
    num_samples: int | None,
    num_time_bins: int | None,
    weights: Literal["ema", "model"],
    device: str,
) -> HeldoutLoss:
    """Loss of the model at `path`; what is None is taken from the recipe's validation section, or its defaults.

    The texts of `data` are in its own shards, or in the companion set `text`, by default the recipe's for validation.
    Computed in fp32. For a run that trains in fp32, the recipe's own settings give the very figure that training logs.
    Raises InputError if neither `data` nor the recipe names a dataset, or if it does not fit the model.
    """
    model = load_pretrained(path, weights=weights, device=device)
    recipe = read_meta(find_checkpoint(path))["recipe"]
    section, reading = recipe["validation"], DataConfig.model_validate(recipe["data"])
    if data is None and section is None:
        raise InputError(f"{path}: its recipe has no validation section; name a dataset with --data")
    changes = {"path": data, "text": text, "num_samples": num_samples, "num_time_bins": num_time_bins}
    config = ValidationConfig.model_validate(
        {"every_samples": 1, **(section or {}), **{key: value for key, value in changes.items() if value is not None}}
    )
    if data is not None and text is None and read_manifest(data).text is not None:
        config = config.model_copy(update={"text": None})  # the recipe's companion set belongs to the recipe's dataset
    dataset = open_heldout(
        config.path,
        model.card,
        text=config.text,
        reading=reading.reading,
        cache=reading.cache,
        bad_samples=reading.bad_samples,
    )
    with join_world(device) as world:
        objective = build_objective(model.card.diffusion)
        loss = heldout_loss(
            objective, model, read_in_order(dataset), list(shape_sizes(dataset).values()), config, world
        )
    if loss.num_bad:
        warn(f"{config.path}: {loss.num_bad} samples could not be read and do not count")
    return loss
