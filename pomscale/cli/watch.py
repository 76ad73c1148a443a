"""`pomscale watch`: one run, live in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb."""
    watch = verbs.add_parser("watch", help="Show one run live in the terminal")
    watch.add_argument("run_folder", metavar="RUN", help="Run, named as for `pomscale runs`; it may not exist yet")
    watch.add_argument("--once", action="store_true", help="Print one frame and exit")
    watch.set_defaults(run=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    from launch.status.runs import RUNS, NoSuchRun, resolve_run
    from launch.status.watch import watch

    word = arguments.run_folder
    try:
        folder = resolve_run(word)
    except NoSuchRun:  # it may still begin
        folder = Path(word) if "/" in word else RUNS / word
    watch(folder, once=arguments.once)
    return 0
