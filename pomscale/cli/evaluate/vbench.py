"""`pomscale evaluate vbench`: add the results of VBench to a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.cli.arguments import positive

_NAME = "vbench"


def add(evaluate_verbs: Any) -> None:
    """Add the verb to those of `evaluate`."""
    vbench = evaluate_verbs.add_parser(
        "vbench", help="Add VBench's results and their total scores to a run's record and to wandb"
    )
    vbench.add_argument("run_folder", type=Path, metavar="RUN", help="Run folder")
    vbench.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.json", help="File *_eval_results.json that VBench wrote"
    )
    checkpoint = vbench.add_mutually_exclusive_group(required=True)
    checkpoint.add_argument(
        "--videos",
        type=Path,
        metavar="DIR",
        help="Directory of `sample --vbench`, whose manifest says how many samples the model has seen",
    )
    checkpoint.add_argument(
        "--samples", type=positive, metavar="N", help="Number of samples that the checkpoint has seen"
    )
    vbench.set_defaults(run=_evaluate, leaves_threads=True)  # a wandb server that hangs must not hold the exit


def _evaluate(arguments: argparse.Namespace) -> int:
    from pomscale.evaluation.vbench import read_results
    from pomscale.monitoring.wandb.sink import deliver_without_training
    from pomscale.runs.evaluation_log import record
    from pomscale.runs.metric_names import evaluation_name

    run_folder = arguments.run_folder
    found = read_results(arguments.results)
    samples = arguments.samples or _samples_of(arguments.videos, run_folder)
    print(found.table())
    record(run_folder, samples, {evaluation_name(_NAME, figure): value for figure, value in found.figures.items()})
    deliver_without_training(run_folder)
    print(f"recorded at {samples:,} samples of {run_folder}")
    return 0


def _samples_of(videos: Path, run_folder: Path) -> int:
    """Return the samples that the model of the videos had seen. Raise InputError if it is not of this run."""
    from pomscale.config.load import load_train_recipe
    from pomscale.runs.layout import RECIPE_FILE
    from pomscale.sampling.vbench_suite import MANIFEST, read_manifest

    model = read_manifest(videos)["model"]
    if "samples" not in model:
        raise InputError(f"{videos / MANIFEST}: does not say how many samples the model had seen; give --samples")
    name = load_train_recipe(run_folder / RECIPE_FILE).name
    if model.get("run", name) != name:
        raise InputError(f"{videos / MANIFEST}: videos of run {model['run']!r}, and {run_folder} is run {name!r}")
    return int(model["samples"])
