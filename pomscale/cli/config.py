"""`pomscale config ...`: look at recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pomscale.cli.arguments import add_recipe


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    config = verbs.add_parser("config", help="Show, list and check recipes")
    config_verbs = config.add_subparsers(metavar="VERB", required=True)
    show = config_verbs.add_parser("show", help="Print the resolved recipe: defaults, bases and overrides applied")
    add_recipe(show)
    show.set_defaults(run=_show)
    listing = config_verbs.add_parser("list", help="List the recipes that come with pomscale, with one line about each")
    listing.set_defaults(run=_list)
    validate = config_verbs.add_parser("validate", help="Check recipes and list every problem with file and line")
    validate.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE", help="Recipe to check")
    validate.set_defaults(run=_validate)
    schema = config_verbs.add_parser("schema", help="Print the JSON schema of recipes")
    schema.set_defaults(run=_schema)


def _show(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from pomscale.config.shipped import shipped_recipes, summary

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0) + 2
    for name, path in recipes.items():
        print(f"{name:<{width}}{summary(path)}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from pomscale.base.errors import InputError
    from pomscale.config.load import RecipeError, load_recipe
    from pomscale.config.train import TrainRecipe
    from pomscale.shards.alignment import check_local_features

    problems: list[str] = []
    for recipe in arguments.recipes:
        try:
            loaded = load_recipe(recipe)
            if isinstance(loaded, TrainRecipe):
                check_local_features(loaded)
        except RecipeError as error:
            problems += error.problems
        except InputError as error:
            problems.append(f"{recipe}: {error}")
    if problems:
        raise RecipeError(problems)
    print(f"{len(arguments.recipes)} recipe(s) valid")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0
