"""`pomscale ema`: an average of the weights whose length is chosen after training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_exported, finite, positive


def add(verbs: Any) -> None:
    """Add the verb."""
    ema = verbs.add_parser(
        "ema", help="Write an average of any length, made from the snapshots that ema.post_hoc in the recipe keeps"
    )
    ema.add_argument("run_folder", type=Path, metavar="RUN", help="Run folder")
    length = ema.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--width", type=finite, help="Width of a power-function average: sigma_rel of EDM2, such as 0.07"
    )
    length.add_argument(
        "--halflife-samples", type=positive, metavar="N", help="Half-life of an exponential average, in samples"
    )
    ema.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="Most samples seen at the end of the average (default: those of the last snapshot)",
    )
    add_exported(ema)
    ema.set_defaults(run=_ema)


def _ema(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.post_hoc_ema import export_post_hoc

    average = export_post_hoc(
        arguments.run_folder,
        arguments.out,
        width=arguments.width,
        halflife_samples=arguments.halflife_samples,
        samples=arguments.samples,
        dtype=arguments.dtype,
    )
    print(f"{average}; wrote {arguments.out}")
    return 0
