"""Job folders that were moved or copied: their job is made to run where the folder lies now.

A job is described with absolute paths, since its ranks may start in any folder. Those of its own job folder, and of
the stages that were moved with it in the folder of a pipeline, are replaced when it is submitted again; other paths
(datasets, scratch) are not the job's to change.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from launch.record.job import JobSpec
from launch.record.pipeline import stage_moves
from pomscale.base.errors import InputError
from pomscale.config.load import load_train_recipe, validate
from pomscale.config.train import TrainRecipe
from pomscale.config.yaml_file import RecipeSource, override
from pomscale.runs.layout import EVALUATIONS_FOLDER, RECIPE_FILE


def is_in_place(spec: JobSpec, job_folder: Path) -> bool:
    """Whether the job is described with the path of the folder that it lies in, or with another path of the same."""
    return _is_same(Path(spec.job_folder), job_folder)


def spec_here(spec: JobSpec, job_folder: Path) -> JobSpec:
    """Return the job such that it runs in this folder. InputError if the folder that it was launched from is gone."""
    if not is_in_place(spec, job_folder):
        then, now = Path(spec.job_folder), Path(os.path.abspath(job_folder))
        moves = {**stage_moves(now.parent), _run_of(then): _run_of(now)}
        commands = [[_follow(moves, word) for word in words] for words in spec.commands]
        cwd = _working_folder(spec, now)
        spec = replace(spec, job_folder=str(now), commands=commands, cwd=str(cwd))
    if not Path(spec.cwd).is_dir():
        raise InputError(
            f"{job_folder}: it was launched from {spec.cwd}, which is gone, and paths in its recipe may be relative to "
            "it; make that folder again, or launch the run again from where its data are"
        )
    return spec


def _follow(moves: Mapping[Path, Path], word: str) -> str:
    """Return a word of a command with the path in it as it is after the moves."""
    paths = {str(then): str(now) for then, now in moves.items()}
    longest_first = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![^=])({longest_first})(?=/|$)", lambda found: paths[found[1]], word)


def recipe_here(recipe: TrainRecipe, job_folder: Path) -> TrainRecipe:
    """Return the recipe of a run such that it trains in this folder. InputError if a run cannot have its name."""
    folder = Path(os.path.abspath(job_folder))
    values = recipe.model_dump(mode="json") | {"name": folder.name, "output": str(folder.parent)}
    try:
        return cast(TrainRecipe, validate(RecipeSource(values, {(): str(job_folder)})))
    except InputError as error:
        raise InputError(f"{error}; a run cannot have the name of this folder: rename the folder") from None


def train_command(run_folder: Path) -> str:
    """Return the command that continues a run without a job in this folder, wherever its recipe lets it train."""
    path = run_folder / RECIPE_FILE
    words = ["pomscale", "train", str(path)]
    with suppress(InputError, OSError):  # no such file: the run has not come so far
        recipe = load_train_recipe(path)
        if not _is_same(Path(recipe.output, recipe.name), run_folder):
            here = Path(os.path.abspath(run_folder))
            words += [override("name", here.name), override("output", str(here.parent))]
    return shlex.join(words)


def _is_same(path: Path, folder: Path) -> bool:
    try:
        return path.samefile(folder)
    except OSError:
        return False


def _run_of(job_folder: Path) -> Path:
    """Return the run folder that a job folder lies in, if it is that of an evaluation; else the job folder."""
    return job_folder.parents[2] if job_folder.parent.parent.name == EVALUATIONS_FOLDER else job_folder


def _working_folder(spec: JobSpec, now: Path) -> Path:
    """Return where the job's commands start: where they did, unless that folder was moved with the job folder in it."""
    cwd, then = Path(spec.cwd), Path(spec.job_folder)
    if cwd.is_dir() or not then.is_relative_to(cwd):
        return cwd
    inside = then.relative_to(cwd)
    moved = now.parents[len(inside.parts) - 1]
    return moved if moved / inside == now else cwd
