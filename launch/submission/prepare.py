"""Preparation of a job: a recipe, or commands, and a request become a job that has been checked. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launch.record.job import JobSpec, LaunchedAs, Submission, read_submissions
from launch.status.runs import RUNS, summarize
from launch.status.state import LIVE
from launch.submission.checks import (
    check_encode_folder,
    check_machine,
    check_not_in_queue,
    check_run_folder,
    check_source,
    check_time_limit,
    check_training_data,
)
from launch.submission.prepared import Prepared
from pomscale.base.errors import InputError
from pomscale.base.names import MAX_NAME_BYTES, shortened
from pomscale.config.cluster import ClusterProfile, expanded
from pomscale.config.load import load_encode_recipe, load_train_recipe
from pomscale.config.monitoring import WandbConfig
from pomscale.config.sweep import check_is_one_run
from pomscale.config.train import TrainRecipe
from pomscale.runs.layout import LAUNCHED_RECIPE_FILE


@dataclass(frozen=True)
class JobRequest:
    """Request for a job: the cluster, the number of machines, the limits.

    gpus_per_node, ranks_per_node, time_limit: replace the profile's. command_line: as typed, to launch the same again.
    to_come: absolute paths of datasets and run folders that jobs before this one make. replacing: whether the job that
    waits in the job folder will be cancelled before this one is submitted. dry_run: note what would refuse the job,
    instead of raising it: the job script can be shown all the same.
    """

    profile: ClusterProfile
    cluster_name: str
    num_nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    time_limit: str | None = None
    command_line: Sequence[str] = ()
    to_come: Collection[Path] = ()
    replacing: bool = False
    dry_run: bool = False


class _Checks:
    """Checks of one job. The first that fails ends its preparation; in a dry run all are made, and refusals noted."""

    def __init__(self, request: JobRequest) -> None:
        self._dry_run = request.dry_run
        self.refusals: list[str] = []

    @contextmanager
    def next(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if not self._dry_run:
                raise
            self.refusals.append(str(error))


def prepare_train(path: Path, overrides: Sequence[str], request: JobRequest) -> Prepared:
    """Prepare a training run, whose job folder is its run folder. InputError, with the remedy, if anything is wrong."""
    recipe = load_train_recipe(path, list(overrides))
    check_is_one_run(recipe, path)
    return prepare_run(recipe, request)


def prepare_run(recipe: TrainRecipe, request: JobRequest) -> Prepared:
    """Prepare a training run, like prepare_train, from a recipe that has been read."""
    profile = request.profile
    check_time_limit(profile, request.time_limit)
    for evaluation in recipe.evaluations:
        try:
            check_time_limit(profile, evaluation.time_limit)
        except InputError as error:
            raise InputError(f"evaluations: {evaluation.name}: {error}") from error
    job_folder = run_folder(recipe, profile)
    spec = replace(
        _job_spec(recipe.name, job_folder, [["train", str(job_folder / LAUNCHED_RECIPE_FILE)]], request),
        is_run=True,
        evaluations=bool(recipe.evaluations),
    )
    checks, dataset, plan = _Checks(request), None, list[str]()
    with checks.next():
        dataset = check_training_data(recipe, profile, request.to_come)
    with checks.next():
        plan = check_machine(recipe, profile, spec.num_nodes, spec.num_ranks, dataset)
    with checks.next():
        _check_queue(job_folder, request)
    with checks.next():
        check_run_folder(job_folder, recipe)
    wandb, notes = _wandb(recipe.monitoring.wandb, profile, job_folder)
    monitoring = recipe.monitoring.model_copy(update={"wandb": wandb})
    return Prepared(
        spec,
        profile,
        _launched_as(LAUNCHED_RECIPE_FILE, request),
        recipe=recipe.model_copy(update={"output": str(job_folder.parent), "monitoring": monitoring}),
        notes=notes,
        plan=tuple(plan),
        gpus_per_node=request.gpus_per_node,
        num_before=len(read_submissions(job_folder)),
        refusals=tuple(checks.refusals),
    )


def prepare_encode(
    path: Path,
    overrides: Sequence[str],
    request: JobRequest,
    *,
    array: int | None = None,
    job_folder: Path | None = None,
) -> Prepared:
    """Prepare an encode. A task has one rank, and one GPU if the nodes have any, unless the request says otherwise.

    The dataset's folder is that of the recipe, relative to the current folder and not to the profile's scratch, as
    `data.path` of a recipe that trains on it is, too.

    Args:
        path: The recipe.
        overrides: Changes of the recipe, such as "a.b=c".
        request: How the job shall run.
        array: Number of tasks of an array that share the work; None for the ranks of one job.
        job_folder: Default: runs/encode-NAME.

    Raises:
        InputError: With the remedy, if anything is wrong.
    """
    check_time_limit(request.profile, request.time_limit)
    recipe = load_encode_recipe(path, list(overrides))
    checks = _Checks(request)
    with checks.next():
        check_source(recipe, request.to_come)
    request = _one_process_by_default(request)
    job_folder = job_folder or resolved_output(str(RUNS), request.profile) / f"encode-{recipe.name}"
    spec = _job_spec(job_folder.name, job_folder, [["data", "encode", str(job_folder / LAUNCHED_RECIPE_FILE)]], request)
    with checks.next():
        _check_queue(job_folder, request)
    with checks.next():
        check_encode_folder(job_folder, recipe)
    wandb, notes = _wandb(recipe.wandb, request.profile, job_folder)
    return Prepared(
        spec,
        request.profile,
        _launched_as(LAUNCHED_RECIPE_FILE, request),
        recipe=recipe.model_copy(update={"wandb": wandb}),
        notes=notes,
        array=array,
        gpus_per_node=request.gpus_per_node,
        num_before=len(read_submissions(job_folder)),
        refusals=tuple(checks.refusals),
    )


def prepare_commands(name: str, job_folder: Path, commands: list[list[str]], request: JobRequest) -> Prepared:
    """Prepare a job of pomscale's commands, which all of its ranks run one after another.

    Args:
        name: Name of the job.
        job_folder: Made absolute.
        commands: The words after `pomscale`, for each command.
        request: How the job shall run.

    Raises:
        InputError: With the remedy, if anything is wrong.
    """
    check_time_limit(request.profile, request.time_limit)
    checks = _Checks(request)
    with checks.next():
        _check_queue(job_folder, request)
    return Prepared(
        _job_spec(name, job_folder.absolute(), commands, request),
        request.profile,
        _launched_as(None, request),
        gpus_per_node=request.gpus_per_node,
        num_before=len(read_submissions(job_folder)),
        refusals=tuple(checks.refusals),
    )


def resolved_output(output: str, profile: ClusterProfile) -> Path:
    """Return the absolute path of a folder of runs. A relative one lies below the profile's scratch, if it has one."""
    scratch = "" if profile.scratch is None else expanded(profile.scratch, "scratch")
    return Path(scratch, output).absolute()


def run_folder(recipe: TrainRecipe, profile: ClusterProfile) -> Path:
    """Return the absolute path of the run folder."""
    return resolved_output(recipe.output, profile) / recipe.name


def in_queue(job_folder: Path) -> Submission | None:
    """Return the submission that waits or runs in this job folder, if there is one."""
    if not job_folder.is_dir() or summarize({job_folder: job_folder.name}).runs[0].state not in LIVE:
        return None
    return next(iter(read_submissions(job_folder)[-1:]), None)


def _check_queue(job_folder: Path, request: JobRequest) -> None:
    if not request.replacing:
        check_not_in_queue(job_folder)


def _one_process_by_default(request: JobRequest) -> JobRequest:
    if request.gpus_per_node is not None or request.ranks_per_node is not None:
        return request
    return replace(request, gpus_per_node=min(request.profile.gpus_per_node, 1), ranks_per_node=1)


def _job_spec(name: str, job_folder: Path, commands: list[list[str]], request: JobRequest) -> JobSpec:
    profile = request.profile
    return JobSpec(
        job_folder=str(job_folder),
        name=shortened(name, MAX_NAME_BYTES),  # SLURM's accounting takes 255
        commands=commands,
        cwd=str(Path.cwd()),
        num_nodes=request.num_nodes,
        ranks_per_node=_ranks_per_node(profile, request.gpus_per_node, request.ranks_per_node),
        ranks_by=profile.ranks_by,
        environment=_environment(profile),
        max_idle_requeues=profile.max_idle_requeues,
    )


def _ranks_per_node(profile: ClusterProfile, gpus_per_node: int | None, ranks_per_node: int | None) -> int:
    num_gpus = profile.gpus_per_node if gpus_per_node is None else gpus_per_node
    if num_gpus > profile.gpus_per_node:
        raise InputError(f"gpus_per_node: {num_gpus}, but a node of this cluster has {profile.gpus_per_node}")
    if num_gpus and ranks_per_node not in (None, num_gpus):
        raise InputError(f"ranks_per_node: {ranks_per_node}, with {num_gpus} GPUs per node; a rank has one GPU")
    num_ranks = num_gpus or ranks_per_node or (1 if profile.gpus_per_node else profile.num_ranks_per_node)
    if num_ranks > profile.cpus_per_node:
        raise InputError(f"ranks_per_node: {num_ranks} ranks, but a job gets {profile.cpus_per_node} cores per node")
    return num_ranks


def _environment(profile: ClusterProfile) -> dict[str, str]:
    """Return the variables of every rank. Those that the profile names win over those derived from other settings."""
    derived = {}
    if profile.network_interface is not None:
        derived = {name: profile.network_interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    if profile.offline:
        derived["HF_HUB_OFFLINE"] = "1"  # weights come from the cache at once, not after requests that time out
    return {**derived, **profile.environment}


def _wandb(config: WandbConfig, profile: ClusterProfile, job_folder: Path) -> tuple[WandbConfig, tuple[str, ...]]:
    """Return the settings of wandb for the nodes of a cluster, and notes for the user."""
    notes = []
    if config.mode == "online" and profile.offline:
        config = config.model_copy(update={"mode": "offline"})
        notes.append(
            f"wandb is offline, since these nodes have no internet: `pomscale runs sync {job_folder}` uploads from here"
        )
    return config, (*notes, *config.overruled({**os.environ, **profile.environment}))


def _launched_as(recipe: str | None, request: JobRequest) -> LaunchedAs:
    profile = request.profile.model_dump(mode="json")
    command_line = list(request.command_line)
    return LaunchedAs(recipe, request.cluster_name, profile, request.num_nodes, request.time_limit, command_line)
