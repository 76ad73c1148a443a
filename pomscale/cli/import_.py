"""`pomscale import`: weights of other code as a folder that `load_pretrained` reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_exported, positive


def add(verbs: Any) -> None:
    """Add the verb."""
    homm = verbs.add_parser("import", help="Convert a Lightning checkpoint of davidpicard/HoMM for load_pretrained")
    homm.add_argument(
        "file", type=Path, metavar="FILE", help="Checkpoint of a ClassConditionalDiH or a ClassConditionalDiT"
    )
    add_exported(homm, with_dtype=False)
    homm.add_argument("--degree", type=positive, default=2, help="Degree of DiH's polynomial (default: %(default)s)")
    homm.add_argument(
        "--heads",
        type=positive,
        help="Number of DiT's attention heads (default: as in the published model of its size)",
    )
    homm.add_argument("--latent-size", type=positive, default=32, help="Side of the latents (default: %(default)s)")
    homm.add_argument(
        "--objective",
        choices=["eps", "flow"],
        default="eps",
        help="Objective of the training: eps, or flow for their mode fm (default: %(default)s)",
    )
    homm.add_argument(
        "--codec-path",
        metavar="DIR",
        help="Directory with the weights of the VAE, whose identity is then recorded (default: not recorded)",
    )
    homm.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.homm import import_homm

    imported = import_homm(
        arguments.file,
        arguments.out,
        degree=arguments.degree,
        heads=arguments.heads,
        latent_size=arguments.latent_size,
        objective=arguments.objective,
        codec_path=arguments.codec_path,
    )
    print(imported)
    return 0
