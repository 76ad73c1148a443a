"""Checks that the features of a teacher fit a network that is aligned with them."""

from __future__ import annotations

from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.config.model import ModelConfig, of_shape
from pomscale.config.train import TrainRecipe
from pomscale.shards.schema import MANIFEST_NAME, FeaturesInfo, Manifest, check_features, read_manifest


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
