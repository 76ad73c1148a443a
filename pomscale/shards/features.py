"""Checks of a companion set of a teacher's features against the set of the pictures that they are of."""

from __future__ import annotations

from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.shards.schema import FeaturesInfo, Manifest


def features_info(location: str | Path, manifest: Manifest) -> FeaturesInfo:
    """Return `manifest.features`. Raises InputError, naming the remedy, for a set without features."""
    if manifest.features is None:
        raise InputError(
            f"dataset {location}: has no features of a teacher; encode them with a `features` section in a recipe of "
            "their own, and name that set"
        )
    return manifest.features


def check_features(
    location: str | Path, manifest: Manifest, main_location: str | Path, main: Manifest, *, flips: bool
) -> FeaturesInfo:
    """Return what the features in a set are, after a check that they are those of the pictures in another set.

    Args:
        location: The set with the features.
        manifest: Its manifest.
        main_location: The set with the pictures, or clips, or their latents.
        main: Its manifest.
        flips: Whether pictures will be mirrored, if their set has flips.

    Raises:
        InputError: The set has no features, those of media that were cut or resized in another way, or none of the
            mirrored media. The message names both values and the remedy.
    """
    info = features_info(location, manifest)
    settings = zip(_transform_settings(main), _transform_settings(manifest), strict=True)
    for (name, wanted), (_, found) in settings:
        if found != wanted:
            raise InputError(
                f"dataset {location}: its features are of another transform ({name} {found}) than {main_location} "
                f"({name} {wanted}); encode the features again with the pictures' transform"
            )
    if flips and main.latent is not None and main.latent.has_flip and not info.has_flip:
        raise InputError(
            f"dataset {location}: has no features of mirrored pictures, and those of {main_location} are mirrored; "
            "encode the features with transform.flip: true, or set data.flip_probability: 0"
        )
    return info


def _transform_settings(manifest: Manifest) -> list[tuple[str, object]]:
    """Return by name what decides the pixels of media, and of which the features are."""
    transform = manifest.transform
    return [
        ("kind", manifest.modality),
        ("size", None if transform is None else transform.targets),
        ("filter", None if transform is None else transform.filter),
        ("fps", manifest.fps),
        ("version", manifest.transform_version),
    ]
