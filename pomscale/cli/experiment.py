"""`pomscale experiment`: a grid of runs that ends in a table and a plot."""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.base.errors import InputError
from pomscale.cli.arguments import add_recipe, check_command
from pomscale.cli.cluster import PROFILE, add_changes

if TYPE_CHECKING:
    from pomscale.experiments.points import Experiment


def add(verbs: Any) -> None:
    """Add the verb."""
    experiment = verbs.add_parser(
        "experiment",
        help="Run an experiment: trainings and commands over a grid and several seeds, to a table and a plot",
        description="Run an experiment: trainings and commands over a grid and several seeds, one after another, each "
        "printed as a user would type it. What is done is not done again, so the same command continues after a kill. "
        "In the end there are results.json, table.txt, plot.png and row.md in OUTPUT/NAME.",
    )
    add_recipe(experiment)
    experiment.add_argument("--small", action="store_true", help="Take the small version: minutes on a laptop")
    experiment.add_argument(
        "--dry-run", action="store_true", help="Check everything and show what would be run, but run nothing"
    )
    experiment.add_argument("--draw", action="store_true", help="Draw what is done so far, and run nothing")
    experiment.add_argument("--only", metavar="STEP", help="Name of one training or point, which alone is done")
    experiment.add_argument("--cluster", metavar="PROFILE", help=f"{PROFILE}; every step becomes a job on it")
    add_changes(experiment)
    experiment.set_defaults(run=partial(_experiment, verbs.choices))


def _experiment(verbs: Mapping[str, argparse.ArgumentParser], arguments: argparse.Namespace) -> int:
    from pomscale.experiments.points import read_experiment

    _check_options(arguments)
    experiment = read_experiment(arguments.recipe, arguments.overrides, small=arguments.small)
    for command in [
        *map(shlex.split, experiment.recipe.prepare),
        *(one for at in experiment.points for one in at.commands),
    ]:
        _check_command(verbs, command)
    if arguments.cluster is not None:
        return _submit(experiment, arguments)
    if arguments.dry_run:
        _show(experiment)
        return 0
    if arguments.draw:
        _draw(experiment)
        return 0
    return _run(experiment, arguments.only)


def _check_options(arguments: argparse.Namespace) -> None:
    for one, other in itertools.combinations(("only", "draw", "cluster", "dry_run"), 2):
        is_given = bool(getattr(arguments, one) and getattr(arguments, other))
        if is_given and (one, other) != ("cluster", "dry_run"):
            raise InputError(f"--{one} and --{other.replace('_', '-')}: give one of them")
    if arguments.set and not arguments.cluster:
        raise InputError("--set: goes with --cluster")


def _check_command(verbs: Mapping[str, argparse.ArgumentParser], words: list[str]) -> None:
    """Raise InputError for words that are neither a command of pomscale nor `-m MODULE ...`."""
    if words[0] != "-m":
        check_command(verbs, words)
    elif not _is_module("".join(words[1:2])):
        raise InputError(f"`{_typed(words)}` is no command: there is no module {''.join(words[1:2])}".rstrip())


def _is_module(name: str) -> bool:
    """Whether `python -m` finds a module, which may lie in the working folder. Nothing is imported."""
    top, *parts = name.split(".")
    spec = (PathFinder.find_spec(top, [str(Path.cwd())]) or find_spec(top)) if top else None
    for part in parts:
        spec = PathFinder.find_spec(part, spec.submodule_search_locations or []) if spec else None
    return spec is not None


def _show(experiment: Experiment) -> None:
    from pomscale.plan.model_cost import num_parameters, training_flops

    recipe = experiment.recipe
    for command in recipe.prepare:
        print(f"prepare\n  $ {_typed(shlex.split(command))}")
    total = 0
    for training in experiment.trainings:
        model, samples = training.recipe.model, training.recipe.training.total_samples
        flops = training_flops(model) * samples
        total += flops
        print(f"{training.name}: {num_parameters(model) / 1e6:.1f} M parameters, {flops:.2e} FLOPs")
        print(f"  $ {_typed(training.words)}")
    for point in experiment.points:
        print(point.name)
        for words in point.commands:
            print(f"  $ {_typed(words)}")
    print(
        f"{recipe.name}: {len(experiment.trainings)} trainings of {total:.2e} FLOPs in all, {len(experiment.points)} "
        f"points over {len(recipe.seeds)} seeds, in {experiment.folder}; nothing was run"
    )


def _typed(words: list[str]) -> str:
    return shlex.join(["python", *words] if words[0] == "-m" else ["pomscale", *words])


def _run(experiment: Experiment, only: str | None) -> int:
    from pomscale.experiments.run import run_experiment

    outcome = run_experiment(experiment, only)
    for step, reason in outcome.failed.items():
        print(f"failed: {step}: {reason}", file=sys.stderr)
    if only is None:
        _draw(experiment)
    if outcome.waiting:
        print(f"not done yet, or in the hands of another process: {', '.join(outcome.waiting)}", file=sys.stderr)
    return 0 if outcome.is_complete else 1


def _draw(experiment: Experiment) -> None:
    from pomscale.base.files import make_folder
    from pomscale.experiments.draw import draw
    from pomscale.experiments.results import collect

    make_folder(experiment.folder)
    print(draw(experiment.folder, collect(experiment)))
    print(f"the table, the plot and the figures as JSON are in {experiment.folder}")


def _submit(experiment: Experiment, arguments: argparse.Namespace) -> int:
    from launch.submission.prepare import resolved_output
    from pomscale.config.load import load_cluster
    from pomscale.config.yaml_file import override
    from pomscale.experiments.jobs import write_pipeline
    from pomscale.experiments.points import read_experiment
    from pomscale.experiments.run import run_experiment
    from pomscale.experiments.steps import PREPARE

    output = resolved_output(experiment.recipe.output, load_cluster(arguments.cluster, arguments.set))
    overrides = [*arguments.overrides, override("output", str(output))]
    experiment = read_experiment(arguments.recipe, overrides, small=arguments.small)
    if experiment.recipe.prepare and not arguments.dry_run:
        run_experiment(experiment, PREPARE)
    words = ["launch", str(write_pipeline(experiment)), "--cluster", arguments.cluster]
    words += [word for change in arguments.set for word in ("--set", change)]
    words += ["--dry-run"] if arguments.dry_run else []
    print(f"$ {_typed(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", "pomscale", *words], check=False).returncode
