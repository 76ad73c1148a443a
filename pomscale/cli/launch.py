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

from pomscale.base.errors import InputError
from pomscale.cli.arguments import add_recipe, positive, unknown_words

_PROFILE = "name in slurm/clusters, or the path of a YAML file"


def add(verbs: Any) -> None:
    """The verbs."""
    launch = verbs.add_parser("launch", help="submit a run, an encode, a sweep or a pipeline to a cluster")
    add_recipe(launch)
    launch.add_argument("--cluster", required=True, metavar="PROFILE", help=_PROFILE)
    _add_changes(launch)
    launch.add_argument("--nodes", type=positive, help="of the job (default 1)")
    launch.add_argument("--time", metavar="H:MM:SS", help="time limit (default: the profile's)")
    launch.add_argument("--array", type=positive, metavar="N", help="of an encode: N tasks that share the work")
    launch.add_argument("--dry-run", action="store_true", help="check everything, show the job script, submit nothing")
    launch.add_argument("--new-code", action="store_true", help="a run that began goes on with the code of now")
    launch.set_defaults(run=partial(_launch, verbs.choices))
    cluster = verbs.add_parser("cluster", help="cluster profiles, and whether a cluster works")
    cluster_verbs = cluster.add_subparsers(metavar="VERB", required=True)
    known = cluster_verbs.add_parser("list", help="the profiles that are known by name")
    known.set_defaults(run=_list)
    check = cluster_verbs.add_parser("check", help="submit a one-minute job that tells what works on a cluster")
    check.add_argument("profile", metavar="PROFILE", help=_PROFILE)
    check.add_argument("--nodes", type=positive, help="default 2; 1 without SLURM")
    _add_changes(check)
    check.set_defaults(run=_check)
    probe = cluster_verbs.add_parser("probe", help="what `cluster check` runs on the nodes")
    probe.add_argument("folder", type=Path)
    probe.add_argument("--offline", action="store_true", help="do not try to reach the internet")
    probe.add_argument("--signal", action="store_true", help="wait for one")
    probe.set_defaults(run=_probe, leaves_threads=True)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the profile: --set account=abc@h100"
    )


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
    from pomscale.config.load import load_cluster
    from pomscale.config.shipped import known_clusters

    for name, path in known_clusters().items():
        print(f"{name:<16}{load_cluster(path).description}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from launch.cluster.check import check_cluster
    from pomscale.config.load import load_cluster

    profile = load_cluster(arguments.profile, arguments.set)
    report = check_cluster(arguments.profile, profile, num_nodes=arguments.nodes)
    print(report)
    return report.exit_code


def _probe(arguments: argparse.Namespace) -> int:
    from pomscale.distributed.cluster_probe import probe

    probe(arguments.folder, offline=arguments.offline, expect_signal=arguments.signal)
    return 0
