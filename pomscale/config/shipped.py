"""Recipes and cluster profiles that come with pomscale: each has a name, under which it is found from any folder."""

from __future__ import annotations

from pathlib import Path

from pomscale.base.installation import recipes_folder, slurm_folder


def known_clusters() -> dict[str, Path]:
    """Return name -> file of the shipped cluster profiles."""
    return {path.stem: path for path in sorted((slurm_folder() / "clusters").glob("*.yaml"))}


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes. A name is the path in recipes/ without .yaml: image/dipom-xl-2."""
    folder = recipes_folder()
    return {path.relative_to(folder).as_posix().removesuffix(".yaml"): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_references() -> dict[str, Path]:
    """Return name -> file of the shipped reference curves, see `pomscale report --against`."""
    return {path.stem: path for path in sorted((recipes_folder() / "reference").glob("*.json"))}


def recipe_file(name_or_path: str | Path) -> Path:
    """Return the file of a recipe that is given by path or by the name of a shipped one; a path comes first."""
    path = Path(name_or_path)
    return path if path.is_file() else shipped_recipes().get(path.as_posix(), path)


def summary(recipe: Path) -> str:
    """Return the second line of a shipped recipe, which says what the recipe is."""
    return recipe.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
