"""What is installed is what is in the tree, and is found there."""

from __future__ import annotations

import tomllib

from pomscale.base.installation import CODE_PACKAGES, recipes_folder, root, slurm_folder
from support.paths import RECIPES, ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
MAPPED = SETUPTOOLS["package-dir"]  # package -> a folder that lies elsewhere in the tree


def test_every_package_of_the_tree_is_listed() -> None:
    """One that is not would be missing from a wheel, and nobody would notice in a checkout."""
    folders = {path.parent for name in CODE_PACKAGES for path in (ROOT / name).rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = SETUPTOOLS["packages"]
    assert set(listed) == found | set(MAPPED)
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_recipe_and_script_matches_a_pattern_of_the_wheel() -> None:
    for package, name in MAPPED.items():
        shipped = {path for pattern in SETUPTOOLS["package-data"][package] for path in (ROOT / name).glob(pattern)}
        assert shipped == {path for path in (ROOT / name).rglob("*") if path.is_file()}


def test_a_checkout_finds_its_own_folders() -> None:
    assert (root(), recipes_folder(), slurm_folder()) == (ROOT, RECIPES, ROOT / "slurm")
