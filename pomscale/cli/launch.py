"""`pomscale launch`: submit jobs to a cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from pomscale.cli.arguments import add_recipe, check_command, positive
from pomscale.cli.cluster import PROFILE, add_changes


def add(verbs: Any) -> None:
    """Add the verb."""
    launch = verbs.add_parser("launch", help="Submit a run, an encode, a sweep or a pipeline to a cluster")
    add_recipe(launch)
    launch.add_argument("--cluster", required=True, metavar="PROFILE", help=PROFILE)
    add_changes(launch)
    launch.add_argument("--nodes", type=positive, help="Number of nodes of the job (default: 1)")
    launch.add_argument("--time", metavar="H:MM:SS", help="Time limit of the job (default: the profile's)")
    launch.add_argument("--array", type=positive, metavar="N", help="Number of tasks that share the work of an encode")
    launch.add_argument(
        "--dry-run", action="store_true", help="Check everything and show the job script, but submit nothing"
    )
    launch.add_argument(
        "--new-code",
        action="store_true",
        help="If the run has started before, replace its frozen copy of the code by this checkout",
    )
    launch.set_defaults(run=partial(_launch, verbs.choices))


def _launch(verbs: Mapping[str, argparse.ArgumentParser], arguments: argparse.Namespace) -> int:
    from launch.command import Launch, launch

    asked = Launch(
        recipe=arguments.recipe,
        overrides=arguments.overrides,
        cluster=arguments.cluster,
        changes=arguments.set,
        num_nodes=arguments.nodes,
        time_limit=arguments.time,
        array=arguments.array,
        dry_run=arguments.dry_run,
        new_code=arguments.new_code,
        command_line=["pomscale", *sys.argv[1:]],
    )
    return launch(asked, partial(check_command, verbs))
