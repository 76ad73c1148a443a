"""`pomscale report`: the curves of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb."""
    report = verbs.add_parser("report", help="Draw the curves of one run, or compare several: a PNG and an HTML page")
    report.add_argument("run_folders", nargs="+", type=Path, metavar="RUN", help="Run folder")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="Directory that receives the report (default: the first run folder)"
    )
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from pomscale.monitoring.report.write import write_report

    paths = write_report(arguments.run_folders, arguments.out)
    print(f"wrote {paths.png} and {paths.html}")
    for folder in paths.left_out:
        print(f"left out, since nothing was logged yet: {folder}", file=sys.stderr)
    return 0
