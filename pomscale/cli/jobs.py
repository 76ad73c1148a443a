"""Verbs for runs that were started, by `pomscale launch` or by hand: runs, watch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pomscale.base.console import warn
from pomscale.cli.arguments import positive


class VerbParser(argparse.ArgumentParser):
    """A parser whose verb may be left out: what begins with no known one is for `default_verb`."""

    def __init__(self, *arguments: Any, default_verb: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._default_verb = default_verb
        self.verbs: set[str] = set()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if self._default_verb is not None and not ({*words[:1]} & (self.verbs | {"-h", "--help"})):
            words.insert(0, self._default_verb)
        return super().parse_known_args(words, namespace)


def add(verbs: Any) -> None:
    """The verbs. They need a VerbParser above them."""
    runs = verbs.add_parser(
        "runs",
        default_verb="list",
        help="runs: list, status, logs, cancel, requeue, resume, diff, sync",
        description="Without a verb: list. RUN is a run folder, the name of one below runs/, or the beginning of one.",
    )
    runs_verbs = runs.add_subparsers(metavar="VERB", required=True)
    _add_looks(runs_verbs)
    _add_deeds(runs_verbs)
    runs.verbs = set(runs_verbs.choices)
    watch = verbs.add_parser("watch", help="one run, live in the terminal")
    watch.add_argument("run_folder", metavar="RUN", help="may be one that has not begun")
    watch.add_argument("--once", action="store_true", help="print one frame and end")
    watch.set_defaults(run=_watch)


def _add_looks(verbs: Any) -> None:
    listing = verbs.add_parser("list", help="a table, the newest first")
    listing.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of runs (default: runs)")
    listing.add_argument("--state", default="", metavar="A,B", help="only runs in these states, e.g. running,failed")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=_list)
    status = verbs.add_parser("status", help="everything about one run")
    status.add_argument("run_folder", metavar="RUN")
    status.set_defaults(run=_status)
    logs = verbs.add_parser("logs", help="what its ranks have printed")
    logs.add_argument("run_folder", metavar="RUN")
    logs.add_argument("--rank", type=_rank, default=0, help="a number, or all (default 0)")
    logs.add_argument("--lines", type=positive, help="the last ones (default 50; with --attempt: all)")
    logs.add_argument("--attempt", metavar="JOB-RESTART", help="only that start; `runs status` lists them")
    logs.add_argument("--follow", action="store_true", help="go on until the run is over, over restarts")
    logs.set_defaults(run=_logs)
    diff = verbs.add_parser("diff", help="in what two runs differ: recipe, code, data, losses")
    diff.add_argument("run_a", metavar="A")
    diff.add_argument("run_b", metavar="B")
    diff.set_defaults(run=_diff)


def _add_deeds(verbs: Any) -> None:
    cancel = verbs.add_parser("cancel", help="end runs, and take them from the queue; they save first")
    cancel.add_argument("run_folders", nargs="+", metavar="RUN")
    cancel.set_defaults(run=_cancel)
    requeue = verbs.add_parser("requeue", help="have a run save and start again")
    requeue.add_argument("run_folder", metavar="RUN")
    requeue.add_argument("--now", action="store_true", help="at once, from its last checkpoint (SLURM)")
    requeue.set_defaults(run=_requeue)
    resume = verbs.add_parser("resume", help="submit a run again that has stopped or failed")
    resume.add_argument("run_folder", metavar="RUN")
    resume.add_argument("--nodes", type=positive, help="another number than before")
    resume.add_argument("--time", help="another limit than before: [DAYS-]HOURS:MINUTES[:SECONDS]")
    resume.set_defaults(run=_resume)
    sync = verbs.add_parser("sync", help="upload what wandb has recorded offline")
    sync.add_argument("run_folders", nargs="*", metavar="RUN", help="default: all in runs")
    sync.add_argument("--watch", type=positive, metavar="MINUTES", help="again and again, until Ctrl-C")
    sync.set_defaults(run=_sync)


def _rank(text: str) -> int | None:
    """None: all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on, or all; got {text}")
    return int(text)


def _list(arguments: argparse.Namespace) -> int:
    from launch.status.table import as_json, as_table, list_runs

    found = list_runs(arguments.folders, [word for word in arguments.state.split(",") if word])
    if found.problem:
        warn(f"{found.problem}; the states are what the run folders tell")
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

    home = resolve_run(arguments.run_folder)
    try:
        ended = show_logs(
            home,
            rank=arguments.rank,
            lines=arguments.lines,
            start=arguments.attempt,
            follow=arguments.follow,
        )
    except KeyboardInterrupt:
        return 0
    print(f"({where_logs_are(home)})", file=sys.stderr)
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

    homes = [resolve_run(word) for word in arguments.run_folders]  # all are known before the first is ended
    all_done = True
    for home in homes:
        done = cancel(home)
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

    home = resolve_run(arguments.run_folder)
    job_id = resume(home, num_nodes=arguments.nodes, time_limit=arguments.time)
    print(f"{home}: submitted again, job {job_id}; `pomscale watch {home}` shows it")
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from launch.status.runs import RUNS, find_runs, resolve_run
    from launch.status.sync import sync, watch_and_sync

    def homes() -> dict[Path, str]:
        named = [resolve_run(word) for word in arguments.run_folders]
        return {home: home.resolve().name for home in named} if named else find_runs(RUNS)

    if arguments.watch is None:
        synced = sync(homes())
        waiting = f"; {synced.num_waiting} still being written, left for later" if synced.num_waiting else ""
        print(f"{synced.num_synced} uploaded{waiting}")
        return 0
    with suppress(KeyboardInterrupt):
        watch_and_sync(homes, arguments.watch)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from launch.status.runs import RUNS, NoSuchRun, resolve_run
    from launch.status.watch import watch

    word = arguments.run_folder
    try:
        home = resolve_run(word)
    except NoSuchRun:  # it may still begin
        home = Path(word) if "/" in word else RUNS / word
    watch(home, once=arguments.once)
    return 0
