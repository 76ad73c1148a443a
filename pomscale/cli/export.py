"""`pomscale export`: weights as a folder to use or to publish."""

from __future__ import annotations

import argparse
from typing import Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_exported, add_model


def add(verbs: Any) -> None:
    """Add the verb."""
    export = verbs.add_parser("export", help="Write weights as safetensors with a config, for load_pretrained anywhere")
    add_model(export)
    add_exported(export)
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.weights import export

    export(arguments.model, arguments.out, weights=arguments.weights, dtype=arguments.dtype)
    print(f"wrote {arguments.out}")
    return 0
