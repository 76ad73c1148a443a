"""An experiment as jobs: a pipeline with a stage for each training and each point, and a last one that draws."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pomscale.base.files import make_folder, write_text
from pomscale.config.shipped import recipe_file
from pomscale.config.yaml_file import dump_yaml
from pomscale.experiments.points import Experiment, Point, Training
from pomscale.experiments.steps import asked_of_point, is_done, is_training_done

PIPELINE_FILE = "pipeline.yaml"
_LAST = "draw"


def write_pipeline(experiment: Experiment) -> Path:
    """Write the pipeline of all that is not done yet to the experiment's folder, and return its path."""
    make_folder(experiment.folder)
    path = experiment.folder / PIPELINE_FILE
    write_text(path, dump_yaml(pipeline(experiment)))
    return path


def pipeline(experiment: Experiment) -> dict[str, Any]:
    """Return a recipe of kind pipeline; a point waits for its trainings, and the last stage for all."""
    stages = [_training_stage(experiment, one) for one in experiment.trainings if not is_training_done(one)]
    trained = {stage["name"] for stage in stages}
    for stage in stages:
        stage["after"] = {name: "ok" for name in stage["after"] if name in trained}
    stages += [_point_stage(experiment, one, trained) for one in experiment.points if _is_to_do(experiment, one)]
    everything = {stage["name"]: "any" for stage in stages}
    stages.append({"name": _LAST, "run": [_command(experiment)], "after": everything, "gpus_per_node": 0})
    name = f"experiment-{experiment.recipe.name}"
    return {"kind": "pipeline", "name": name, "output": str(experiment.folder.absolute()), "stages": stages}


def _is_to_do(experiment: Experiment, point: Point) -> bool:
    return bool(point.commands) and not (
        all(is_training_done(training) for training in point.trainings.values())
        and is_done(experiment, point.name, asked_of_point(point))
    )


def _training_stage(experiment: Experiment, training: Training) -> dict[str, Any]:
    return {
        "name": training.name,
        "recipe": str(recipe_file(training.recipe_file).absolute()),
        "overrides": training.overrides,
        "after": training.needs,
        "nodes": experiment.recipe.nodes,
    }


def _point_stage(experiment: Experiment, point: Point, trained: set[str]) -> dict[str, Any]:
    after = {training.name: "ok" for training in point.trainings.values() if training.name in trained}
    return {"name": point.name, "run": [_command(experiment, "--only", point.name)], "after": after}


def _command(experiment: Experiment, *options: str) -> str:
    """Return the words of `pomscale` for a job, which may run in another folder."""
    file = recipe_file(experiment.file).absolute()
    words = ["experiment", str(file), *(["--small"] if experiment.small else []), *options, *experiment.overrides]
    return shlex.join(words)
