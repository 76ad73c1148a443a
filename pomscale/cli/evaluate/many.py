"""Options of `pomscale evaluate images` that evaluate many times: --every over checkpoints, --sweep over options."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.base.errors import InputError
from pomscale.cli.arguments import positive
from pomscale.cli.cluster import PROFILE, add_changes
from pomscale.cli.sample.options import OPTIONS

if TYPE_CHECKING:
    from launch.submission.prepare import JobRequest

# Axes of a sweep whose names are shorter than the options that they stand for.
_AXES = {"interval": "guidance-interval", "schedule": "guidance-schedule", "average": "weights"}
_ONE_EACH = ("json", "write_npz", "write_tars", "write_statistics")  # outputs that many evaluations cannot share
# Options that decide no figure, or are compared otherwise: a sweep may go on with other values of these.
_NOT_COMPARED = ("source", "words", "task", "device", "num_workers", "codec_path", "text_path", "max_skipped")
_OF_DRAWING = ("weights", "seed", "words")  # beside the options of sampling: the model's checkpoint decides on these
_PAIRS = ("guidance-interval",)  # written LO:HI in a sweep, since a comma separates values


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of `evaluate images`."""
    group = parser.add_argument_group("many evaluations")
    parser.set_defaults(parse=parser.parse_args)
    _add_options(group)


def _add_options(group: Any) -> None:
    group.add_argument(
        "--every",
        type=positive,
        metavar="N",
        help="Evaluate the first checkpoint of the run SOURCE after each multiple of N samples, and the last one, "
        "until the run has ended; each is a job of its own on --cluster",
    )
    group.add_argument(
        "--sweep",
        action="append",
        metavar="AXIS=V,V,..",
        help="Evaluate one checkpoint at every point of a grid of options, such as guidance=0,1,2,interval=0:1,0:0.9 "
        "(interval, schedule and average stand for --guidance-interval, --guidance-schedule and --weights); "
        "may be given several times",
    )
    group.add_argument("--cluster", metavar="PROFILE", help=f"{PROFILE}; for the jobs of --every and --sweep")
    add_changes(group)
    group.add_argument("--time", metavar="H:MM:SS", help="Time limit of each job (default: the profile's)")


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether the command is one of these. InputError for options that go with these alone."""
    if arguments.every is not None or arguments.sweep:
        return True
    for option in ("cluster", "time", "set"):
        if getattr(arguments, option):
            raise InputError(f"--{option}: goes with --every or --sweep")
    return False


def run(arguments: argparse.Namespace) -> int:
    """Evaluate many times. Return the exit code."""
    if arguments.every is not None and arguments.sweep:
        raise InputError("--every and --sweep: give one of them")
    if arguments.every is not None:
        return _every(arguments)
    return _sweep(arguments)


def _every(arguments: argparse.Namespace) -> int:
    from launch.pipelines.checkpoints import CheckpointEvaluation
    from pomscale.config.evaluation import FIGURES, EvaluationConfig

    if arguments.cluster is None:
        raise InputError("--every: needs --cluster; `--cluster local` is this machine")
    words, at = _words(arguments, ("work", *_ONE_EACH))
    of_newest = arguments.parse(words)
    words = [word.replace("{", "{{").replace("}", "}}") for word in words]
    words[at] = "{checkpoint}"
    words += ["--no-record", "--work", "{folder}/work", "--json", f"{{folder}}/{FIGURES}"]
    config = EvaluationConfig(
        name=arguments.name, every_samples=arguments.every, run=[shlex.join(["evaluate", "images", *words])]
    )
    evaluation = CheckpointEvaluation(
        Path(arguments.source), config, _request(arguments), check=lambda: arguments.check(of_newest)
    )
    number = evaluation.follow()
    if not number:
        print("nothing is left to submit")
    elif not arguments.dry_run:
        print(f"next      pomscale runs {shlex.quote(str(Path(arguments.source) / 'evaluations' / config.name))}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import make_folder
    from pomscale.evaluation.generated.work_folder import RESULT
    from pomscale.evaluation.sweep import grid, parse_axes, point_name
    from pomscale.evaluation.sweep_source import frozen_source, is_begun

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--sweep: start it without torchrun; its points are jobs with --cluster, or run one by one")
    points = grid(parse_axes(arguments.sweep))
    source = Path(arguments.source)
    folder = Path(arguments.work or Path("sweeps", source.resolve().name)).absolute()
    words, at = _words(arguments, _ONE_EACH)
    for point in points:  # a value that is wrong is found before the first point is measured
        arguments.parse([*words, *_options(point)])
    to_do = {folder / point_name(point): _options(point) for point in points}
    to_do = {part: options for part, options in to_do.items() if not (part / RESULT).is_file()}
    begun = is_begun(folder)
    if not begun:  # a sweep that could not begin leaves nothing
        _check_points(arguments, words, list(to_do.values()))
    if not arguments.dry_run:
        make_folder(folder)
        words[at] = str(frozen_source(source, folder, _shared_options(arguments, words), is_done=not to_do))
        if begun:
            _check_points(arguments, words, list(to_do.values()))
    commands = {part: [*words, *options, "--no-record", "--work", str(part)] for part, options in to_do.items()}
    if arguments.cluster is not None:
        _submit(arguments, commands)
    for command in [] if arguments.cluster is not None else commands.values():
        if arguments.dry_run:
            print(shlex.join(["pomscale", "evaluate", "images", *command]))
            continue
        parsed = arguments.parse(command)
        parsed.run(parsed)
        _write(folder, points)
    if not arguments.dry_run:
        print(_write(folder, points))
    return 0


def _check_points(arguments: argparse.Namespace, words: Sequence[str], points: Sequence[Sequence[str]]) -> None:
    """Make the checks of an evaluation at every point, given its options, without drawing pictures.

    Those that differ in how a model draws share what else there is to check, which takes the loading of the model.
    """
    checked: list[dict[str, Any]] = []
    for options in points:
        parsed = arguments.parse([*words, *options])
        others = {name: value for name, value in vars(parsed).items() if name not in (*OPTIONS, *_OF_DRAWING)}
        if others in checked:
            arguments.check_drawing(parsed)
        else:
            arguments.check(parsed)
            checked.append(others)


def _write(folder: Path, points: Sequence[dict[str, str]]) -> str:
    """Write the tables of a sweep, and return the one for people with the names of the files."""
    from pomscale.evaluation.sweep import read_results, text_table, write_tables
    from pomscale.evaluation.sweep_source import release_source

    results = read_results(folder, points)
    paths = write_tables(folder, results)
    if all(result.metrics is not None for result in results):
        release_source(folder)
    return "\n".join([text_table(results), f"wrote {', '.join(map(str, paths))}"])


def _submit(arguments: argparse.Namespace, commands: dict[Path, list[str]]) -> None:
    from launch.pipelines.points import submit_points

    points = {folder: ["evaluate", "images", *words] for folder, words in commands.items()}
    for folder, state in submit_points(points, _request(arguments)).items():
        print(f"{folder.name}: {state}")


def _request(arguments: argparse.Namespace) -> JobRequest:
    from launch.submission.prepare import JobRequest
    from pomscale.config.load import load_cluster

    profile = load_cluster(arguments.cluster, arguments.set)
    if arguments.time is not None and profile.scheduler != "slurm":
        raise InputError(f"--time: a {profile.scheduler} job has no time limit")
    return JobRequest(
        profile,
        arguments.cluster,
        time_limit=arguments.time,
        command_line=["pomscale", *sys.argv[1:]],
        dry_run=arguments.dry_run,
    )


def _options(point: dict[str, str]) -> list[str]:
    """Return the options of a point."""
    words = []
    for axis, value in point.items():
        option = _AXES.get(axis, axis)
        words += [f"--{option}", value.replace(":", ",") if option in _PAIRS else value]
    return words


def _shared_options(arguments: argparse.Namespace, words: list[str]) -> dict[str, str]:
    """Return the options of all points that decide their figures, by name, where they are not the default."""
    given, defaults = vars(arguments.parse(words)), vars(arguments.parse([str(arguments.source)]))
    return {
        name.replace("_", "-"): str(value)
        for name, value in given.items()
        if name not in _NOT_COMPARED and value != defaults.get(name)
    }


def _words(arguments: argparse.Namespace, reserved: Sequence[str]) -> tuple[list[str], int]:
    """Return the words of the command without the options of this module, and the index of SOURCE among them.

    Raises InputError if one of the `reserved` options was given: the many evaluations each have their own.
    """
    for option in reserved:
        if getattr(arguments, option):
            raise InputError(f"--{option.replace('_', '-')}: each of these evaluations has its own; leave it out")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_options(own)
    own.add_argument("--name")
    own.add_argument("--work")
    for flag in ("--dry-run", "--no-record"):
        own.add_argument(flag, action="store_true")
    _, words = own.parse_known_args(arguments.words)
    mark = "SOURCE"
    for at, word in enumerate(words):
        if word != str(arguments.source):
            continue
        parsed = arguments.parse([*words[:at], mark, *words[at + 1 :]])
        if parsed.every is not None or parsed.sweep:
            raise InputError("--every, --sweep, --cluster and the like: write these options in full")
        if str(parsed.source) == mark:
            return words, at
    raise InputError(f"{arguments.source}: write SOURCE as a plain path, without . or / at its end")
