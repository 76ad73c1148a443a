"""Verbs for runs and their recipes: train, plan, report, config."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_recipe, positive

if TYPE_CHECKING:
    from pomscale.config.train import TrainRecipe
    from pomscale.plan.report import DatasetSize


def add(verbs: Any) -> None:
    """The verbs."""
    train = verbs.add_parser("train", help="train a model from a recipe; resumes by itself")
    add_recipe(train)
    train.set_defaults(run=_train, leaves_threads=True)
    plan = verbs.add_parser("plan", help="memory, traffic, time and storage of a run, before a GPU is asked for")
    add_recipe(plan)
    plan.add_argument("--nodes", type=positive, default=1, help="default 1")
    plan.add_argument("--gpus-per-node", type=positive, default=8, help="default 8")
    plan.add_argument("--gpu", choices=["a100", "h100", "h200"], default="h100", help="default h100")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the data sheet's FLOP/s (default 0.4)")
    plan.set_defaults(run=_plan)
    report = verbs.add_parser("report", help="curves of a run, or of several compared: a PNG and a self-contained page")
    report.add_argument("run_folders", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="folder; default: the run folder, or that of the first run")
    report.set_defaults(run=_report)
    _add_config(verbs)


def _add_config(verbs: Any) -> None:
    config = verbs.add_parser("config", help="look at recipes")
    config_verbs = config.add_subparsers(metavar="VERB", required=True)
    show = config_verbs.add_parser("show", help="print the resolved recipe: defaults, bases and overrides applied")
    add_recipe(show)
    show.set_defaults(run=_config_show)
    listed = config_verbs.add_parser("list", help="list the recipes that come with pomscale, with one line about each")
    listed.set_defaults(run=_config_list)
    validate = config_verbs.add_parser("validate", help="check recipes; lists every problem with file and line")
    validate.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    validate.set_defaults(run=_config_validate)
    schema = config_verbs.add_parser("schema", help="print the JSON schema of recipes")
    schema.set_defaults(run=_config_schema)


def _train(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_train_recipe
    from pomscale.config.sweep import check_is_one_run

    recipe = load_train_recipe(arguments.recipe, arguments.overrides)  # before torch: a typo is told at once
    check_is_one_run(recipe, arguments.recipe)

    with large_imports():
        # Otherwise FSDP2 and the optimizers import it, when they are first called.
        import torch._dynamo  # noqa: F401

        from pomscale.training.run import train

    return train(recipe)


def _plan(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_train_recipe
    from pomscale.plan.report import plan, render

    recipe = load_train_recipe(arguments.recipe, arguments.overrides)
    made = plan(
        recipe,
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu=arguments.gpu,
        utilization=arguments.mfu,
        dataset=_dataset_size(recipe),
    )
    print(render(made), end="")
    return 0


def _dataset_size(recipe: TrainRecipe) -> DatasetSize | None:
    """What the manifests say; None if one is not there yet, or lies behind a URL, which a plan does not wait for."""
    from pomscale.plan.report import DatasetSize
    from pomscale.shards.schema import MANIFEST_NAME, read_manifest

    folders = [Path(component.path) for component in recipe.data.components]
    if not all((folder / MANIFEST_NAME).is_file() for folder in folders):
        return None
    manifests = [read_manifest(folder) for folder in folders]
    num_bytes = sum(shard.num_bytes for manifest in manifests for shard in manifest.shards)
    return DatasetSize(sum(manifest.num_samples for manifest in manifests), num_bytes)


def _config_show(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _config_list(arguments: argparse.Namespace) -> int:
    from pomscale.config.shipped import shipped_recipes, summary

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0) + 2
    for name, path in recipes.items():
        print(f"{name:<{width}}{summary(path)}")
    return 0


def _config_validate(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import RecipeError, load_recipe

    problems: list[str] = []
    for recipe in arguments.recipes:
        try:
            load_recipe(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    print(f"{len(arguments.recipes)} recipe(s) valid")
    return 0


def _config_schema(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pomscale.monitoring.report.write import write_report

    paths = write_report(arguments.run_folders, arguments.out)
    print(f"wrote {paths.png} and {paths.html}")
    for folder in paths.left_out:
        print(f"left out, since nothing was logged yet: {folder}", file=sys.stderr)
    return 0
