"""`pomscale runs ...`: runs that were started, by `pomscale launch` or by hand."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pomscale.base.console import warn
from pomscale.cli.arguments import positive


def add(verbs: Any) -> None:
    """Add the verb and its own verbs; `verbs` must belong to a VerbParser."""
    runs = verbs.add_parser(
        "runs",
        default_verb="list",
        help="List, inspect and control runs",
        description="Without a verb, list the runs. RUN is a run folder, the name of one below runs/, or the beginning "
        "of such a name.",
    )
    runs_verbs = runs.add_subparsers(metavar="VERB", required=True)
    _add_inspection(runs_verbs)
    _add_control(runs_verbs)
    runs.verbs = set(runs_verbs.choices)


def _add_inspection(verbs: Any) -> None:
    listing = verbs.add_parser("list", help="List runs in a table, the newest first")
    listing.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="Directory with runs in it (default: runs)"
    )
    listing.add_argument(
        "--state", default="", metavar="A,B", help="States of the runs to list, such as running,failed (default: all)"
    )
    listing.add_argument("--json", action="store_true", help="Print JSON for programs")
    listing.set_defaults(run=_list)
    status = verbs.add_parser("status", help="Show everything about one run")
    _add_run(status)
    status.set_defaults(run=_status)
    logs = verbs.add_parser("logs", help="Print the output of a run's ranks")
    _add_run(logs)
    logs.add_argument("--rank", type=_rank, default=0, help="Number of the rank, or all (default: %(default)s)")
    logs.add_argument(
        "--lines", type=positive, help="Number of lines from the end (default: 50; all of them with --start)"
    )
    logs.add_argument(
        "--start",
        "--attempt",
        dest="start",
        metavar="JOB-RESTART",
        help="Start whose output is printed alone; `runs status` lists them",
    )
    logs.add_argument("--follow", action="store_true", help="Print new output until the run is over")
    logs.set_defaults(run=_logs)
    diff = verbs.add_parser("diff", help="Compare two runs: recipe, code, data and losses")
    diff.add_argument("run_a", metavar="A", help="First run")
    diff.add_argument("run_b", metavar="B", help="Second run")
    diff.set_defaults(run=_diff)


def _add_control(verbs: Any) -> None:
    cancel = verbs.add_parser("cancel", help="Stop runs, which save first, and take them from the queue")
    _add_run(cancel, "run_folders", nargs="+")
    cancel.set_defaults(run=_cancel)
    requeue = verbs.add_parser("requeue", help="Make a run save and start again")
    _add_run(requeue)
    requeue.add_argument(
        "--now", action="store_true", help="Start again from the last checkpoint without saving first (SLURM)"
    )
    requeue.set_defaults(run=_requeue)
    resume = verbs.add_parser("resume", help="Submit a run again that has stopped or failed")
    _add_run(resume)
    resume.add_argument("--nodes", type=positive, help="Number of nodes (default: as before)")
    resume.add_argument(
        "--time", metavar="[D-]H:MM[:SS]", help="Time limit as [DAYS-]HOURS:MINUTES[:SECONDS] (default: as before)"
    )
    resume.set_defaults(run=_resume)
    sync = verbs.add_parser("sync", help="Upload the offline recordings of wandb")
    _add_run(sync, "run_folders", nargs="*", more=" (default: all in runs)")
    sync.add_argument(
        "--watch", type=positive, metavar="MINUTES", help="Interval to repeat the upload at, until Ctrl-C"
    )
    sync.set_defaults(run=_sync)


def _add_run(parser: argparse.ArgumentParser, name: str = "run_folder", *, more: str = "", **options: Any) -> None:
    what = "Run folder, the name of one below runs/, or the beginning of such a name"
    parser.add_argument(name, metavar="RUN", help=what + more, **options)


def _rank(text: str) -> int | None:
    """Parse the number of a rank; None = all of them."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on, or all; got {text}")
    return int(text)


def _list(arguments: argparse.Namespace) -> int:
    from launch.status.table import as_json, as_table, list_runs

    found = list_runs(arguments.folders, [word for word in arguments.state.split(",") if word])
    if found.problem:
        warn(f"{found.problem}; the states are those in the run folders")
    print(as_json(found) if arguments.json else as_table(found))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from launch.status.overview import status
    from launch.status.runs import resolve_run

    print(status(resolve_run(arguments.run_folder)))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from launch.status.logs import show_logs, where_logs_are
    from launch.status.runs import resolve_run

    folder = resolve_run(arguments.run_folder)
    try:
        ended = show_logs(
            folder,
            rank=arguments.rank,
            lines=arguments.lines,
            start=arguments.start,
            follow=arguments.follow,
        )
    except KeyboardInterrupt:
        return 0
    print(f"({where_logs_are(folder)})", file=sys.stderr)
    if ended is not None:
        print(f"{ended.name}: {ended.state}" + (f": {ended.reason}" if ended.reason else ""), file=sys.stderr)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from launch.status.diff import diff
    from launch.status.runs import resolve_run

    print(diff(resolve_run(arguments.run_a), resolve_run(arguments.run_b)))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launch.status.runs import resolve_run
    from launch.submission.control import cancel

    folders = [resolve_run(word) for word in arguments.run_folders]  # all are known before the first is stopped
    all_done = True
    for folder in folders:
        done = cancel(folder)
        print(done.text, flush=True)
        all_done = all_done and done.done
    return 0 if all_done else 1


def _requeue(arguments: argparse.Namespace) -> int:
    from launch.status.runs import resolve_run
    from launch.submission.control import requeue

    print(requeue(resolve_run(arguments.run_folder), now=arguments.now))
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    from launch.status.runs import resolve_run
    from launch.submission.control import resume

    folder = resolve_run(arguments.run_folder)
    job_id = resume(folder, num_nodes=arguments.nodes, time_limit=arguments.time)
    print(f"{folder}: submitted again, job {job_id}; `pomscale watch {shlex.quote(str(folder))}` shows it")
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from launch.status.runs import RUNS, find_runs, resolve_run
    from launch.status.sync import sync, watch_and_sync

    def folders() -> dict[Path, str]:
        named = [resolve_run(word) for word in arguments.run_folders]
        return {folder: folder.resolve().name for folder in named} if named else find_runs(RUNS)

    if arguments.watch is None:
        synced = sync(folders())
        waiting = f"; {synced.num_waiting} still being written, left for later" if synced.num_waiting else ""
        print(f"{synced.num_synced} uploaded{waiting}")
        return 0
    with suppress(KeyboardInterrupt):
        watch_and_sync(folders, arguments.watch)
    return 0
