"""The `pomscale` command, one module per verb.

Parsing imports only argparse and modules that need nothing else, so that --help and errors in the arguments are instant
on a login node; each verb imports the rest when it runs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback

from pomscale import __version__
from pomscale.base.errors import PomscaleError
from pomscale.cli import (
    bench,
    cluster,
    completion,
    config,
    data,
    ema,
    evaluate,
    experiment,
    export,
    import_,
    launch,
    plan,
    report,
    runs,
    sample,
    train,
    watch,
)
from pomscale.cli.arguments import VerbParser, unknown_words

_VERBS = (
    train,
    plan,
    launch,
    runs,
    watch,
    report,
    data,
    sample,
    evaluate,
    experiment,
    export,
    import_,
    ema,
    config,
    cluster,
    bench,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 failed, 2 wrong input, 3 done with skipped items, 75 stopped on request."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character of a log or a curve shows "?"
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if unknown := unknown_words(parsed, rest):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides += rest
    try:
        code = parsed.run(parsed)
    except PomscaleError as error:
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        code = 130  # as shells report Ctrl-C
    except Exception:
        if not parsed.leaves_threads:
            raise
        traceback.print_exc()
        code = 1
    if parsed.leaves_threads:
        # All is saved, closed and written by now. The rest is the interpreter's end of torch's background threads,
        # which once in a few hundred exits aborts ("terminate called without an active exception") and turns a finished
        # run into a crashed one; after an error it may wait for ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pomscale", description="Train attention-free diffusion models from latent shards, on one machine or many."
    )
    parser.add_argument("--version", action="version", version=f"pomscale {__version__}")
    parser.set_defaults(leaves_threads=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=VerbParser)
    for verb in _VERBS:
        verb.add(verbs)
    completion.add(verbs, parser)
    return parser
