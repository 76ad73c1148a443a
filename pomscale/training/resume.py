"""May this run go on from that checkpoint? What decides the numbers of a run, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pomscale import __version__
from pomscale.base.errors import InputError
from pomscale.config.identity import differences
from pomscale.config.train import TrainRecipe
from pomscale.data.mixture import Mixture
from pomscale.pretrained.card import ModelCard

CHECKPOINT_FORMAT = 4

# What the card says of the space that the network has learned, and what to call it.
_LATENT_SPACE = {
    "codec_identity": "the weights of the codec that encoded the dataset",
    "latent_mean": "the mean that normalises latents",
    "latent_std": "the standard deviation that normalises latents",
}


def identity(recipe: TrainRecipe, mixture: Mixture) -> dict[str, Any]:
    """What decides every number of a run: goes into each checkpoint, and must be the same when it is resumed."""
    data = [
        {
            "path": dataset.location,
            "share": share,
            "fingerprint": dataset.manifest.fingerprint,
            "index": dataset.manifest.index.sha256,
            "text": None if dataset.text is None else dataset.text.source.manifest.fingerprint,
        }
        for dataset, share in zip(mixture.datasets, mixture.shares, strict=True)
    ]
    return {"recipe": recipe.model_dump(mode="json"), "data": data}


def check_same_run(folder: Path, checkpoint: Path, now: dict[str, Any], card: ModelCard, then: dict[str, Any]) -> None:
    """InputError unless the run in `folder` may go on from the checkpoint.

    now: the identity of the run that is started; then: the checkpoint's meta.
    """
    if then["format"] != CHECKPOINT_FORMAT:
        raise InputError(
            f"{checkpoint}: written by pomscale {then['versions']['pomscale']}, whose runs this version "
            f"({__version__}) cannot go on with; use that version, or choose another name"
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
    if found:
        raise InputError(
            f"{folder}: this run began with another recipe, so it cannot go on with this one. "
            f"Choose another name, or undo: {'; '.join(found)}"
        )


def _data_differences(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
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
    return found
