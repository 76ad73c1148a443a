"""`pomscale train`: train a model from a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_recipe


def add(verbs: Any) -> None:
    """Add the verb."""
    train = verbs.add_parser("train", help="Train a model from a recipe, or continue its run")
    add_recipe(train)
    train.set_defaults(run=_train, leaves_threads=True)


def _train(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_train_recipe
    from pomscale.config.sweep import check_is_one_run

    # Before torch, so that a typo is reported at once.
    recipe = load_train_recipe(arguments.recipe, arguments.overrides)
    check_is_one_run(recipe, arguments.recipe)

    with large_imports():
        # Otherwise FSDP2 and the optimizers import it, when they are first called.
        import torch._dynamo  # noqa: F401

        from pomscale.training.run import train

    return train(recipe, process_ends=True)
