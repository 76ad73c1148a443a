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
    report.add_argument(
        "--against",
        nargs="+",
        metavar="REFERENCE",
        help="Reference curves that each RUN is compared with: a shipped name, a file of --write-reference, or run "
        "folders; the exit code is 1 if a run leaves their band",
    )
    report.add_argument(
        "--other-recipe", action="store_true", help="With --against: compare although the recipes differ"
    )
    report.add_argument(
        "--write-reference",
        type=Path,
        metavar="FILE.json",
        help="File that receives the curves of the RUNs, which differ in their seed alone, as a reference",
    )
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from pomscale.base.errors import InputError
    from pomscale.monitoring.report.write import write_report

    if arguments.against and arguments.write_reference:
        raise InputError("--against and --write-reference: give one of them")
    if arguments.other_recipe and not arguments.against:
        raise InputError("--other-recipe: goes with --against")
    if arguments.against:
        return _compare(arguments)
    if arguments.write_reference:
        return _write_reference(arguments)

    paths = write_report(arguments.run_folders, arguments.out)
    print(f"wrote {paths.png} and {paths.html}")
    for folder in paths.left_out:
        print(f"left out, since nothing was logged yet: {folder}", file=sys.stderr)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import make_folder
    from pomscale.monitoring.report.against import compare_with, write_picture
    from pomscale.monitoring.report.reference import find_reference

    reference = find_reference(arguments.against)
    folders: list[Path] = arguments.run_folders
    verdicts = [compare_with(folder, reference, other_recipe=arguments.other_recipe) for folder in folders]
    for verdict in verdicts:
        print(verdict.words())
    out = arguments.out or folders[0]
    make_folder(out)
    print(f"wrote {write_picture(verdicts, out)}")
    return 0 if all(verdict.is_inside for verdict in verdicts) else 1


def _write_reference(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written
    from pomscale.monitoring.report.reference import reference_of, write_reference

    check_can_be_written(arguments.write_reference)
    reference = reference_of(arguments.run_folders)
    write_reference(reference, arguments.write_reference)
    listed = ", ".join(f"{name} ({len(curve.samples)} points)" for name, curve in reference.curves.items())
    print(f"wrote {arguments.write_reference}: {listed}")
    return 0
