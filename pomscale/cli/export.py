"""`pomscale export`: weights as a folder to use or to publish."""

from __future__ import annotations

import argparse
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_exported, add_model


def add(verbs: Any) -> None:
    """Add the verb."""
    export = verbs.add_parser("export", help="Write weights as safetensors with a config, for load_pretrained anywhere")
    add_model(export)
    add_exported(export)
    export.add_argument(
        "--format",
        choices=["pomscale", "jitpp"],
        default="pomscale",
        help="Format of --out. jitpp: a file that davidpicard/JiTpp reads, with the trained weights and two averages, "
        "of a network with JiT's choices (default: %(default)s)",
    )
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.format == "jitpp":
        return _export_jit(arguments)

    with large_imports():
        from pomscale.pretrained.weights import export

    export(arguments.model, arguments.out, weights=arguments.weights, dtype=arguments.dtype)
    print(f"wrote {arguments.out}")
    return 0


def _export_jit(arguments: argparse.Namespace) -> int:
    if arguments.weights != "ema":
        raise InputError("--weights: JiTpp's files hold the trained weights and two averages; leave it out")

    with large_imports():
        from pomscale.pretrained.jit_export import export_jit

    sets = export_jit(arguments.model, arguments.out, dtype=arguments.dtype)
    print(f"wrote {arguments.out}: {', '.join(sets)}")
    return 0
