"""Descriptions of the way in which pictures were cut and resized, and the check that two sets agree in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pomscale.base.errors import InputError
from pomscale.config.encode import TransformConfig, transform_version
from pomscale.shards.schema import read_manifest


def crop_of(transform: TransformConfig | None) -> dict[str, Any] | None:
    """Return what decides the pixels of a transform, as JSON: kind, targets, filter and version; None of none.

    Targets are (height, width), also of clips: how many frames are measured is said elsewhere.
    """
    if transform is None:
        return None
    targets = dict.fromkeys(target[-2:] for target in transform.targets)
    return {
        "kind": transform.kind,
        "targets": [list(target) for target in targets],
        "filter": transform.filter,
        "version": transform_version(transform),
    }


def crop_of_training(data: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the crop of the datasets that a checkpoint names; None where they are not here or differ."""
    found = []
    for dataset in data:
        try:
            found.append(crop_of(read_manifest(dataset["path"]).transform))
        except InputError:  # the model may have been trained on another machine
            return None
    return found[0] if found and all(crop == found[0] for crop in found) else None


def check_crops(reference: str, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    """Raise InputError if it is known that reference and training pictures were cut in different ways."""
    if theirs is None or ours is None or theirs == ours:
        return
    differing = [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in ours if theirs.get(key) != ours[key]]
    raise InputError(
        f"--reference {reference}: its pictures were cropped otherwise than the model's training pictures "
        f"({'; '.join(differing)}), so the distance would not be the model's alone. Measure a reference that was "
        f"cropped alike, or allow it with --any-crop"
    )
