"""`pomscale cluster ...`: profiles of clusters, and checks of a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.cli.arguments import positive

PROFILE = "Cluster profile: a name in slurm/clusters, or the path of a YAML file"


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    cluster = verbs.add_parser("cluster", help="List cluster profiles, and check whether a cluster works")
    cluster_verbs = cluster.add_subparsers(metavar="VERB", required=True)
    known = cluster_verbs.add_parser("list", help="List the profiles that have a name")
    known.set_defaults(run=_list)
    check = cluster_verbs.add_parser("check", help="Submit a one-minute job that reports what works on a cluster")
    check.add_argument("profile", metavar="PROFILE", help=PROFILE)
    check.add_argument("--nodes", type=positive, help="Number of nodes (default: 2, or 1 without SLURM)")
    add_changes(check)
    check.set_defaults(run=_check)
    probe = cluster_verbs.add_parser("probe", help="Run the probe that `cluster check` starts on every node")
    probe.add_argument("folder", type=Path, metavar="DIR", help="Directory that receives the findings")
    probe.add_argument("--offline", action="store_true", help="Do not try to reach the internet")
    probe.add_argument("--signal", action="store_true", help="Wait for the signal that the check sends")
    probe.set_defaults(run=_probe, leaves_threads=True)


def add_changes(parser: Any) -> None:
    """Add --set to a parser or to a group of its arguments."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Change to the profile, such as --set account=abc@h100; may be given several times",
    )


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
