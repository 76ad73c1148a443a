"""Folders that belong to the code that is running: recipes and scripts for SLURM.

    checkout, editable install, frozen copy: ROOT/{pomscale,launch,data_pipelines} and ROOT/{recipes,slurm}
    wheel: ROOT/{pomscale,launch,data_pipelines} and ROOT/pomscale/shipped/{recipes,slurm}

In a wheel ROOT is site-packages, where a folder `recipes` or `slurm` would belong to somebody else. pyproject.toml maps
the folders of the checkout to pomscale/shipped.
"""

from __future__ import annotations

from pathlib import Path

CODE_PACKAGES = ("pomscale", "launch", "data_pipelines")

_POMSCALE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """Folder that holds the packages: the checkout, a frozen copy of it, or site-packages."""
    return _POMSCALE.parent


def recipes_folder() -> Path:
    """Folder of the recipes that come with this code."""
    return _shipped("recipes")


def slurm_folder() -> Path:
    """Folder of requeue.sh, train.sbatch and clusters/."""
    return _shipped("slurm")


def _shipped(name: str) -> Path:
    in_wheel = _POMSCALE / "shipped"
    return (in_wheel if in_wheel.is_dir() else root()) / name
