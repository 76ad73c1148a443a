"""Steps of an experiment: what each depends on, and whether it is done.

A training is done when its run folder says so, whoever has trained it: this command, a job, a person. Of the commands
of a point, and of those that prepare the data, steps/NAME.json in the experiment's folder tells what was asked for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.config.identity import values_that_differ
from pomscale.config.load import load_train_recipe
from pomscale.config.train import TrainRecipe
from pomscale.experiments.points import Experiment, Point, Training
from pomscale.runs.checkpoint_folder import complete_checkpoints, samples_of
from pomscale.runs.history import read_history
from pomscale.runs.layout import CHECKPOINTS_FOLDER, METRICS_FILE, RECIPE_FILE
from pomscale.runs.outcome import is_finished

PREPARE = "prepare"

# Fields that no figure of a run depends on; a cluster profile changes those of monitoring.
_NOT_OF_THE_RESULT = {"name", "output", "resume", "monitoring"}


@dataclass(frozen=True)
class Record:
    """What a step left. asked: everything that its result depends on; reason: why it failed."""

    asked: dict[str, Any]
    state: Literal["begun", "done", "failed"]
    seconds: float = 0.0
    reason: str = ""


def log_file(experiment: Experiment, step: str) -> Path:
    return experiment.folder / "logs" / f"{step}.log"


def read_record(experiment: Experiment, step: str) -> Record | None:
    """Return what a step left, None if it has not begun yet. Raises InputError for a file that is no record."""
    path = _record_file(experiment, step)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is no record of a step ({error}); delete it, and the step is done again") from error


def write_record(experiment: Experiment, step: str, record: Record) -> None:
    make_folder(_record_file(experiment, step).parent)
    write_text(_record_file(experiment, step), json.dumps(asdict(record), indent=1) + "\n")


def _record_file(experiment: Experiment, step: str) -> Path:
    return experiment.folder / "steps" / f"{step}.json"


def is_training_done(training: Training) -> bool:
    """Return whether a run is finished. Raises InputError if it was made, or begun, by another recipe."""
    folder, recipe = training.folder, training.recipe
    if not (folder / RECIPE_FILE).is_file():
        return False
    begun_with = load_train_recipe(folder / RECIPE_FILE)
    if different := list(values_that_differ("", _result_of(begun_with), _result_of(recipe))):
        raise InputError(
            f"{folder}: this run was begun by another recipe ({'; '.join(different[:3])}); remove it, or give the "
            "experiment another name: name=..."
        )
    complete = complete_checkpoints(folder / CHECKPOINTS_FOLDER)
    return bool(complete) and samples_of(complete[-1]) >= recipe.training.total_samples and is_finished(folder)


def _result_of(recipe: TrainRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=_NOT_OF_THE_RESULT)


def asked_of_point(point: Point) -> dict[str, Any]:
    """Return the commands of a point, and when each of its runs wrote its last row: one made again counts as new."""
    trained = {
        name: read_history(training.folder).last_time_unix_s if (training.folder / METRICS_FILE).is_file() else None
        for name, training in point.trainings.items()
    }
    return {"commands": point.commands, "trained_unix_s": trained}


def asked_of_prepare(experiment: Experiment) -> dict[str, Any]:
    return {"commands": experiment.recipe.prepare}


def is_done(experiment: Experiment, step: str, asked: dict[str, Any]) -> bool:
    """Return whether commands have succeeded that were asked for like this."""
    record = read_record(experiment, step)
    return record is not None and record.state == "done" and record.asked == asked
