"""Resuming: how far a run is, whether a recipe may continue it, and its state from the newest checkpoint.

A checkpoint holds the identity of its run, which decides every number of it; a run is continued by the same identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale import __version__
from pomscale.base.clock import Clock
from pomscale.base.errors import InputError
from pomscale.checkpoint.store import CheckpointStore, read_meta
from pomscale.config.identity import differences
from pomscale.config.train import TrainRecipe
from pomscale.data.dataset import LatentDataset
from pomscale.data.mixture import Mixture
from pomscale.engine.protocol import Engine
from pomscale.pretrained.card import ModelCard
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.integrity import find_damage_of
from pomscale.runs.layout import CHECKPOINT_META, CHECKPOINTS_FOLDER
from pomscale.runs.outcome import is_finished
from pomscale.shards.class_names import class_difference

CHECKPOINT_FORMAT = 4

# Fields of the card about the space that the network has learned, and what to call them in messages.
_LATENT_SPACE = {
    "codec_identity": "the weights of the codec that encoded the dataset",
    "latent_mean": "the mean that normalises latents",
    "latent_std": "the standard deviation that normalises latents",
}


@dataclass(frozen=True)
class Standing:
    """State of a run folder. samples: of its newest checkpoint, 0 without one."""

    samples: int
    is_finished: bool


def find_standing(
    recipe: TrainRecipe,
    folder: Path,
    mixture: Mixture,
    this_run: dict[str, Any],
    card: ModelCard,
) -> Standing:
    """Find how far the run in `folder` is, and write nothing. Called by rank 0 alone.

    this_run: see identity; card: of the recipe. Raises InputError if the recipe may not continue the run.
    """
    mixture.check_indexes()
    complete = complete_checkpoints(folder / CHECKPOINTS_FOLDER)
    if complete and recipe.resume == "never":
        raise InputError(f"{folder}: holds checkpoints, and resume is never; choose another name or delete the folder")
    for checkpoint in reversed(complete):
        if find_damage_of(checkpoint / CHECKPOINT_META) is not None:
            continue  # CheckpointStore.newest sets it aside and warns
        meta = read_meta(checkpoint)
        check_same_run(folder, checkpoint, this_run, card, meta)
        samples: int = meta["samples"]
        return Standing(samples, samples >= recipe.training.total_samples and is_finished(folder))
    return Standing(0, False)


@dataclass(frozen=True)
class Resumed:
    """State that a start of a run begins with: that of `checkpoint`, or, if that is None, the initial one.

    meta: of the checkpoint. clock: moves on when training does.
    """

    engine: Engine
    checkpoints: CheckpointStore
    checkpoint: Path | None
    meta: dict[str, Any] | None
    clock: Clock


def resume(engine: Engine, checkpoints: CheckpointStore) -> Resumed:
    """Fill the engine from the newest checkpoint that is not damaged, if there is one. A collective."""
    newest = checkpoints.newest()
    meta = None if newest is None else restore(engine, checkpoints, newest)
    return Resumed(engine, checkpoints, newest, meta, Clock() if meta is None else Clock.of(meta))


def restore(engine: Engine, checkpoints: CheckpointStore, folder: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint, and return its meta. A collective."""
    with engine.loading() as state:
        checkpoints.load(folder, state)
    return read_meta(folder)


def identity(recipe: TrainRecipe, mixture: Mixture) -> dict[str, Any]:
    """Everything that decides the numbers of a run: each checkpoint holds it, and a resumed run must have the same."""
    data = [
        {
            "path": dataset.location,
            "share": share,
            "fingerprint": dataset.manifest.fingerprint,
            "index": dataset.manifest.index.sha256,
            "text": None if dataset.text is None else dataset.text.source.manifest.fingerprint,
            **_features_of(dataset),
        }
        for dataset, share in zip(mixture.datasets, mixture.shares, strict=True)
    ]
    return {"recipe": recipe.model_dump(mode="json"), "data": data}


def _features_of(dataset: LatentDataset) -> dict[str, str]:
    """Return an entry for the features that are read, if any: runs without them have none."""
    features = dataset.features
    return {} if features is None else {"features": features.source.manifest.fingerprint}


def check_same_run(folder: Path, checkpoint: Path, now: dict[str, Any], card: ModelCard, then: dict[str, Any]) -> None:
    """Raise InputError unless the run in `folder` may be continued from `checkpoint`.

    Args:
        folder: The run folder.
        checkpoint: A complete checkpoint in it.
        now: The identity of the run that is started.
        card: The card of that run.
        then: The meta of the checkpoint.
    """
    if then["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{checkpoint}: written by pomscale {then['versions']['pomscale']}, whose runs this version "
            f"({__version__}) cannot continue; use that version, or choose another name"
        )
    latents_now = card.model_dump(mode="json", include=set(_LATENT_SPACE))
    found = [
        *differences(then["recipe"], now["recipe"]),
        *_data_differences(now["data"], then["data"]),
        *(
            f"{meaning}: {then['card'][key]} then, {latents_now[key]} now"
            for key, meaning in _LATENT_SPACE.items()
            if then["card"][key] != latents_now[key]
        ),
    ]
    difference = class_difference(card.class_names, then["card"]["class_names"])
    if card.text is None and difference is not None:
        found.append(f"the names of the dataset's classes: {difference}, at the run's start")
    if found:
        raise InputError(
            f"{folder}: this run began with another recipe, so it cannot be continued with this one. "
            f"Choose another name, or undo: {'; '.join(found)}"
        )


def _data_differences(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    """Differences between the data of two identities, a line for people each."""
    shares_then, shares_now = ([data["share"] for data in datasets] for datasets in (then, now))
    if shares_then != shares_now:
        return [f"data.mixture: shares of the samples {shares_then} then, {shares_now} now"]
    found = []
    for new, old in zip(now, then, strict=True):
        if new["fingerprint"] != old["fingerprint"]:
            found.append(f"the dataset at {new['path']}: its shards are not those of the run's start")
        elif new["index"] != old["index"]:
            found.append(f"the dataset at {new['path']}: its index (labels, keys) is not that of the run's start")
        elif new["text"] != old["text"]:
            found.append(f"the dataset at {new['path']}: its text embeddings are not those of the run's start")
        elif new.get("features") != old.get("features"):
            found.append(f"the dataset at {new['path']}: its features are not those of the run's start")
    return found
