"""`pomscale evaluate record`: add the figures of a checkpoint to its run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.cli.arguments import positive


def add(evaluate_verbs: Any) -> None:
    """Add the verb to those of `evaluate`."""
    record = evaluate_verbs.add_parser(
        "record", help="Add figures of a checkpoint, and the pictures beside them, to its run's record and to wandb"
    )
    record.add_argument("run_folder", type=Path, metavar="RUN", help="Run folder")
    record.add_argument(
        "name", metavar="NAME", help="Name of the evaluation; figures are logged as evaluation/NAME/FIGURE"
    )
    record.add_argument(
        "samples", type=positive, metavar="SAMPLES", help="Number of samples that the checkpoint has seen"
    )
    record.add_argument(
        "figures",
        type=Path,
        metavar="FIGURES.json",
        help="File with a JSON object of numbers and lists of numbers, or with metrics and settings",
    )
    record.add_argument(
        "--evaluated",
        type=Path,
        metavar="DIR",
        help="Copy of the checkpoint that was made for the evaluation, and is removed afterwards",
    )
    record.set_defaults(run=_record, leaves_threads=True)  # a wandb server that hangs must not hold the exit


def _record(arguments: argparse.Namespace) -> int:
    from pomscale.monitoring.wandb.sink import deliver_without_training
    from pomscale.runs.checkpoint_folder import remove
    from pomscale.runs.evaluation_log import IMAGES, VIDEOS, record
    from pomscale.runs.metric_names import evaluation_name

    name, (figures, settings) = arguments.name, read_figures(arguments.figures)
    beside = sorted(arguments.figures.parent.iterdir())
    clips = {path.stem: path for path in beside if path.suffix.lower() in VIDEOS}
    # The contact sheet of a clip has its name.
    images = {
        f"{path.stem}_sheet" if path.stem in clips else path.stem: path
        for path in beside
        if path.suffix.lower() in IMAGES
    }
    record(
        arguments.run_folder,
        arguments.samples,
        {evaluation_name(name, figure): value for figure, value in figures.items()},
        {evaluation_name(name, stem): path for stem, path in (images | clips).items()},
        settings,
    )
    deliver_without_training(arguments.run_folder)
    if arguments.evaluated is not None:
        remove(arguments.evaluated)
    listed = ", ".join(f"{figure} {value:.5g}" for figure, value in figures.items())
    print(f"recorded at {arguments.samples:,} samples of {arguments.run_folder}: {listed}")
    return 0


def read_figures(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Read the numbers of a JSON object, and the settings that they were measured with.

    The object holds the numbers themselves, or {"metrics": {...}, "settings": {...}}, as `pomscale evaluate images`
    writes it. A list under KEY becomes KEY_00, KEY_01, ...; text and null are left out. Raise InputError if the file is
    not there, is no JSON object, or has no number at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f'{path}: must be an object of figures, such as {{"fid": 9.6}}')
    settings: dict[str, Any] = {}
    if isinstance(content.get("metrics"), dict):
        content, settings = content["metrics"], content.get("settings", {})
        if not isinstance(settings, dict):
            raise InputError(f"{path}: its settings must be an object")
    figures: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, list):
            figures |= {f"{key}_{index:02d}": float(one) for index, one in enumerate(value) if _is_number(one)}
        elif _is_number(value):
            figures[key] = float(value)
    if not figures:
        raise InputError(f"{path}: there is no number in it to record")
    return figures, settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
