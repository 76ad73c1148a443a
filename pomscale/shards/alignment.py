"""Checks that the features of a teacher fit the pictures beside them, and a network that is aligned with them."""

from __future__ import annotations

from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.config.model import ModelConfig, of_shape
from pomscale.config.train import TrainRecipe
from pomscale.shards.schema import MANIFEST_NAME, FeaturesInfo, Manifest, read_manifest


def check_aligned(location: str, features: FeaturesInfo, pictures: Manifest, model: ModelConfig) -> None:
    """Check a companion set of features against the network, for all shapes of the set that it belongs to.

    Args:
        location: The companion set.
        features: Its features.
        pictures: Manifest of the pictures or clips.
        model: The network, with an alignment.

    Raises:
        InputError: Width or grid of the features are not those of the projection and of the network's tokens.
    """
    assert model.alignment is not None
    if features.dim != model.alignment.dim:
        raise InputError(
            f"model.alignment.dim: {model.alignment.dim}, but the features in {location} have width {features.dim}; "
            f"set it to {features.dim}, or encode features of another teacher"
        )
    for group in pictures.groups:
        grid = of_shape(model, group.shape).token_grid
        if features.grid != grid:
            found, wanted = ("x".join(map(str, sides)) for sides in (features.grid, grid))
            raise InputError(
                f"dataset {location}: its features lie on a grid of {found}, and the network cuts latents of "
                f"{'x'.join(map(str, group.shape))} into {wanted} tokens; encode them with features.grid: {list(grid)}"
            )


def check_local_features(recipe: TrainRecipe) -> None:
    """Check the features of a recipe as far as manifests lie on disk. Raises InputError as a run would."""
    if recipe.model.alignment is None:
        return
    for component in recipe.data.components:
        assert component.path is not None
        assert component.features is not None, "TrainRecipe"
        if not all((Path(path) / MANIFEST_NAME).is_file() for path in (component.path, component.features)):
            continue
        pictures, companion = read_manifest(component.path), read_manifest(component.features)
        flips = recipe.data.flip_probability > 0
        info = check_features(component.features, companion, component.path, pictures, flips=flips)
        check_aligned(component.features, info, pictures, recipe.model)


def _features_info(location: str | Path, manifest: Manifest) -> FeaturesInfo:
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
    info = _features_info(location, manifest)
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
