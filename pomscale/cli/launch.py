"""`pomscale launch` and `pomscale cluster ...`: jobs on a cluster, and whether the cluster works."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from pomscale.cli.arguments import add_recipe, positive, unknown_words
from pomscale.errors import InputError


def add(verbs: Any) -> None:
    """The verbs."""
    launch = verbs.add_parser("launch", help="submit a run, an encode, a sweep or a pipeline to a cluster")
    add_recipe(launch)
    _add_cluster_options(launch)
    launch.add_argument("--nodes", type=positive, help="of a training run (default 1)")
    launch.add_argument("--time", metavar="H:MM:SS", help="time limit (default: the profile's)")
    launch.add_argument("--array", type=positive, metavar="N", help="of an encode: N tasks that share the work")
    launch.add_argument("--dry-run", action="store_true", help="check everything, show the job script, submit nothing")
    launch.add_argument("--new-code", action="store_true", help="a run that began goes on with the code of now")
    launch.set_defaults(run=partial(_launch, verbs.choices))
    cluster = verbs.add_parser("cluster", help="cluster profiles, and whether a cluster works")
    cluster_verbs = cluster.add_subparsers(metavar="VERB", required=True)
    known = cluster_verbs.add_parser("list", help="the profiles that are known by name")
    known.set_defaults(run=_list)


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", required=True, metavar="PROFILE", help="name in slurm/clusters, or the path of a YAML file"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the profile: --set account=abc@h100"
    )


def _launch(verbs: Mapping[str, argparse.ArgumentParser], arguments: argparse.Namespace) -> int:
    from launch.launch import Launch, launch

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
        command_line=[Path(sys.argv[0]).name, *sys.argv[1:]],
    )
    return launch(asked, partial(_check_command, verbs))


def _check_command(verbs: Mapping[str, argparse.ArgumentParser], words: list[str]) -> None:
    """InputError for what is no command of pomscale."""
    said = io.StringIO()
    reason = f"the verbs are {', '.join(verbs)}"
    if words and words[0] in verbs:
        try:
            with redirect_stderr(said):
                parsed, rest = verbs[words[0]].parse_known_args(words[1:])
        except SystemExit:
            reason = said.getvalue().strip().rpartition("error: ")[2]
        else:
            if not unknown_words(parsed, rest):
                return
            reason = f"unrecognized arguments: {' '.join(rest)}"
    raise InputError(f"`pomscale {shlex.join(words)}` is no command: {reason}")


def _list(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import known_clusters, load_cluster

    for name, path in known_clusters().items():
        print(f"{name:<16}{load_cluster(path).description}")
    return 0
