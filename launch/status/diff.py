"""`pomscale runs diff A B`: the differences of two runs in recipe, code, data and losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.status.table import NOTHING, table
from launch.status.tail import read_object
from pomscale.base.console import format_count
from pomscale.base.errors import InputError
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.history import read_history
from pomscale.runs.layout import (
    CHECKPOINT_META,
    CHECKPOINTS_FOLDER,
    CODE_DIFF_FILE,
    CODE_STATE_FILE,
    LAUNCH_FILE,
    RECIPE_FILE,
)

_OF_OBJECTIVE = {"train/loss": "training loss", "validation/loss": "held-out loss"}
_METRICS = {**_OF_OBJECTIVE, "validation/v_loss": "held-out loss in v"}
_SPACE = ("diffusion.objective", "diffusion.clamp", "diffusion.noise_scale")
"""Fields that decide what a loss of training is measured of."""
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the samples that both have seen
_MAX_WIDTH = 48
# The location and the name of a run do not change what it computes.
_IGNORED_KEYS = {"name", "output"}


def diff(a: Path, b: Path) -> str:
    """Return tables of the differences. InputError for a run that has no recipe."""
    recipes = _recipe(a), _recipe(b)
    spaces = [[recipe.get(key, "null") for key in _SPACE] for recipe in recipes]
    parts = [
        _section("recipe", _changes(*recipes), a, b),
        _section("code", _changes(_code(a), _code(b)), a, b),
        _section("data", _changes(_data(a), _data(b)), a, b),
        *_losses(a, b, same_space=spaces[0] == spaces[1]),
    ]
    return "\n\n".join(parts)


def _section(title: str, rows: list[list[str]], a: Path, b: Path) -> str:
    return f"{title}: the same" if not rows else table([title, *_names(a, b)], rows)


def _names(a: Path, b: Path) -> tuple[str, str]:
    """Return short names of the runs that differ."""
    return (a.name, b.name) if a.name != b.name else (str(a), str(b))


def _changes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[list[str]]:
    keys = dict.fromkeys([*ours, *theirs])
    return [
        [key, _cut(ours.get(key, NOTHING)), _cut(theirs.get(key, NOTHING))]
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _cut(value: str) -> str:
    return value if len(value) <= _MAX_WIDTH else value[: _MAX_WIDTH - 1] + "…"


def _recipe(job_folder: Path) -> dict[str, str]:
    """Return the resolved recipe of the newest start; before the first start, the recipe that was launched."""
    launched = read_object(job_folder / LAUNCH_FILE) or {}
    candidates = [job_folder / RECIPE_FILE, *([job_folder / launched["recipe"]] if launched.get("recipe") else [])]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InputError(f"{job_folder}: holds no recipe.yaml: no run has begun here")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: this is no YAML: {error}") from error
    return {key: value for key, value in _flat(values).items() if key not in _IGNORED_KEYS}


def _code(job_folder: Path) -> dict[str, str]:
    code = read_object(job_folder / CODE_STATE_FILE) or {}
    shown: dict[str, str] = {key: str(code[key]) for key in ("pomscale", "git_commit") if key in code}
    difference = job_folder / CODE_DIFF_FILE
    if difference.is_file():
        lines = difference.read_text(encoding="utf-8", errors="replace").splitlines()
        files = [line.split(" b/")[-1] for line in lines if line.startswith("diff --git ")]
        changed = [line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
        shown["changed since the commit"] = ", ".join(files) or "nothing"
        shown["lines changed"] = str(len(changed))
    return shown


def _data(job_folder: Path) -> dict[str, str]:
    """Return the fingerprints of the datasets, from the newest checkpoint."""
    for checkpoint in reversed(complete_checkpoints(job_folder / CHECKPOINTS_FOLDER)):
        meta = read_object(checkpoint / CHECKPOINT_META)
        if meta is not None and "data" in meta:
            return _flat({"data": meta["data"]})
    return {}


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings, and lists of them, into {"a.b": "1"}."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values if isinstance(values, str) else json.dumps(values, default=str)}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found


def _losses(a: Path, b: Path, *, same_space: bool) -> list[str]:
    """Compare the losses at numbers of samples at which both runs have logged them.

    same_space: whether their objectives measure the same; else only the loss that is the same for all is compared.
    """
    try:
        ours, theirs = read_history(a).series, read_history(b).series
    except InputError as problem:
        return [f"losses: {problem}"]
    parts = [] if same_space else ["losses of training: not compared, since the objectives measure different things"]
    for metric, title in _METRICS.items():
        if metric in _OF_OBJECTIVE and not same_space:
            continue
        if metric not in ours or metric not in theirs:
            continue
        values_a, values_b = (dict(zip(*series[metric], strict=True)) for series in (ours, theirs))
        both = sorted(values_a.keys() & values_b.keys())
        if not both:
            parts.append(f"{title}: never logged at the same samples")
            continue
        at = sorted({both[round(share * (len(both) - 1))] for share in _SHARES})
        rows = [
            [
                format_count(samples),
                f"{values_a[samples]:.5g}",
                f"{values_b[samples]:.5g}",
                _relative(values_a[samples], values_b[samples]),
            ]
            for samples in at
        ]
        head = [f"{title} at", *_names(a, b), "difference"]
        parts.append(table(head, rows, right=head))
    return parts or ["losses: none that both have logged"]


def _relative(ours: float, theirs: float) -> str:
    return f"{(theirs - ours) / abs(ours):+.2%}" if ours else NOTHING
