"""`pomscale launch`: a recipe of any kind, and a cluster, to jobs; and what people are told of it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.pipelines.launch import launch_pipeline
from launch.record.job import attempts
from launch.scheduler import slurm
from launch.submission.freeze import which_code
from launch.submission.prepare import How, Prepared, prepare_encode, prepare_train
from launch.submission.sweep import plan_sweep, submit_sweep, table
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import load_cluster, load_recipe
from pomscale.config.pipeline import PipelineRecipe
from pomscale.config.shipped import recipe_file
from pomscale.config.sweep import load_points


@dataclass(frozen=True)
class Launch:
    """What was asked for. num_nodes, array, time_limit: None = not said. command_line: to launch the same again."""

    recipe: Path
    overrides: list[str]
    cluster: str
    changes: list[str] = field(default_factory=list)
    num_nodes: int | None = None
    time_limit: str | None = None
    array: int | None = None
    dry_run: bool = False
    new_code: bool = False
    command_line: list[str] = field(default_factory=list)


def launch(asked: Launch, check_command: Callable[[list[str]], None]) -> int:
    """Submit, and print what there is to know. Returns the exit code: 0, or that of a debug job.

    check_command: raises InputError for words that are no command of pomscale. Raises InputError for whatever is wrong,
    before anything is written or submitted.
    """
    recipe = load_recipe(asked.recipe, asked.overrides)
    profile = load_cluster(asked.cluster, asked.changes)
    if asked.time_limit is not None and profile.scheduler != "slurm":
        raise InputError(f"--time: a {profile.scheduler} job has no time limit")
    if isinstance(recipe, PipelineRecipe):
        return _launch_pipeline(asked, recipe, profile, check_command)
    if isinstance(recipe, EncodeRecipe):
        prepared = prepare_encode(
            asked.recipe, asked.overrides, profile, asked.cluster, array=asked.array, **_how(asked)
        )
        return _launch_job(asked, prepared)
    if asked.array is not None:
        raise InputError("--array: only an encode is shared by tasks; a training run spans --nodes")
    if recipe.sweep:
        return _launch_sweep(asked, profile)
    return _launch_job(asked, prepare_train(asked.recipe, asked.overrides, profile, asked.cluster, **_how(asked)))


def _how(asked: Launch) -> How:
    return How(num_nodes=asked.num_nodes or 1, time_limit=asked.time_limit, command_line=asked.command_line)


def _launch_pipeline(
    asked: Launch, recipe: PipelineRecipe, profile: ClusterProfile, check_command: Callable[[list[str]], None]
) -> int:
    said = {"--nodes": asked.num_nodes, "--array": asked.array, "--time": asked.time_limit}
    for option, value in said.items():
        if value is not None:
            raise InputError(f"{option}: every stage of a pipeline says this for itself, in {asked.recipe}")
    told = launch_pipeline(
        recipe,
        recipe_file(asked.recipe),
        profile,
        asked.cluster,
        dry_run=asked.dry_run,
        command_line=asked.command_line,
        check_command=check_command,
        new_code=asked.new_code,
    )
    print(told)
    return 0


def _launch_sweep(asked: Launch, profile: ClusterProfile) -> int:
    planned = plan_sweep(load_points(asked.recipe, asked.overrides), profile, asked.cluster, _how(asked))
    new = [one.prepared for one in planned if one.prepared is not None]
    if new:
        _tell(_about(new[0], asked, f"{len(new)} of {len(planned)} runs, each on"))
    jobs = {} if asked.dry_run else submit_sweep(planned, new_code=asked.new_code)
    print(table(planned, jobs))
    if asked.dry_run or not new:
        print("nothing was submitted" if asked.dry_run else "nothing is left to submit")
    else:
        folder = _short(new[0].home.parent)
        _tell([("next", f"pomscale runs {folder}"), ("", f"pomscale report {folder}/*")])
    return max(map(_exit_code, jobs), default=0) if profile.scheduler == "debug" else 0


def _launch_job(asked: Launch, prepared: Prepared) -> int:
    _tell(_about(prepared, asked, "on"))
    if asked.dry_run:
        _tell_dry_run(prepared)
        return 0
    job_id = prepared.submit(new_code=asked.new_code)
    if prepared.profile.scheduler == "debug":
        return _exit_code(prepared.home)
    home = _short(prepared.home)
    _tell(
        [
            ("job", f"{job_id}, {'an array of ' + str(prepared.array) + ' tasks' if prepared.array else 'submitted'}"),
            ("next", f"pomscale watch {home}" if prepared.spec.is_run else f"pomscale runs status {home}"),
            ("", f"pomscale runs logs {home} --follow"),
            ("", f"pomscale runs cancel {home}"),
        ]
    )
    return 0


def _about(prepared: Prepared, asked: Launch, on: str) -> list[tuple[str, str]]:
    """(what it is, in words), line by line. Of a sweep, that of its first run."""
    spec, limit = prepared.spec, prepared.time_limit or prepared.profile.time_limit
    tasks = f"{prepared.array} tasks of " if prepared.array else ""
    size = f"{tasks}{spec.num_nodes} x {spec.ranks_per_node} ranks"
    lines = [
        ("launch", f"{asked.recipe} {on} {asked.cluster}: {size}" + (f", {limit}" if limit else "")),
        ("folder", _short(prepared.home)),
        ("code", which_code(prepared.home, new_code=asked.new_code)),
    ]
    lines += [(line[:10].strip(), line[10:]) for line in prepared.plan]
    return lines + [("note", note) for note in prepared.notes]


def _tell_dry_run(prepared: Prepared) -> None:
    script = prepared.script()
    if script:
        _tell([("SLURM", _opinion(script))])
        print(f"\n{script}")
    print("nothing was written or submitted")


def _opinion(script: str) -> str:
    """What sbatch thinks of it, without submitting."""
    if not slurm.is_available():
        return "not on this machine, so it was not asked"
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    return "; ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines() if line)


def _exit_code(home: Path) -> int:
    """Of a job that is over."""
    verdict = attempts(home)[-1].verdict
    return 1 if verdict is None else verdict.exit_code


def _tell(lines: Sequence[tuple[str, str]]) -> None:
    for label, text in lines:
        print(f"{label:<10}{text}".rstrip(), flush=True)


def _short(folder: Path) -> str:
    """As people name it here, for a shell."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
