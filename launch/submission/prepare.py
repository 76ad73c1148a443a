"""Recipe + cluster profile -> a job that has been checked and can be submitted. Nothing is written before that."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from launch.record.job import JOBS_FILE, LAUNCH_FILE, JobSpec, LaunchedAs, Submission, keep, sole_launch, submissions
from launch.scheduler import slurm
from launch.status.runs import summarize
from launch.status.state import LIVE
from launch.submission.checks import (
    RECIPE_FILE,
    check_encode_home,
    check_interpreter,
    check_machine,
    check_not_in_queue,
    check_run_folder,
    check_source,
    check_time_limit,
    check_training_data,
)
from launch.submission.freeze import freeze
from launch.submission.job_script import Condition, Wish
from launch.submission.submit import batch_script, submit
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.config.cluster import ClusterProfile, expanded
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import dump_recipe, load_encode_recipe, load_train_recipe
from pomscale.config.monitoring import WandbConfig
from pomscale.config.sweep import check_is_one_run
from pomscale.config.train import TrainRecipe

RUNS = "runs"


@dataclass(frozen=True)
class Prepared:
    """A job that may be submitted as it stands.

    recipe: resolved, as the job will read it; None for a job of commands. notes: what people should know, a line each.
    plan: lines, none where no GPU is known. The rest: see launch.submission.submit.submit.
    """

    spec: JobSpec
    profile: ClusterProfile
    launched_as: LaunchedAs
    recipe: TrainRecipe | EncodeRecipe | None = None
    notes: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    array: int | None = None
    gpus_per_node: int | None = None
    num_before: int = 0

    @property
    def home(self) -> Path:
        return Path(self.spec.home)

    @property
    def time_limit(self) -> str | None:
        return self.launched_as.time_limit

    def waiting_for(self, homes: Mapping[str, Condition]) -> Prepared:
        """After the jobs in these homes, where no scheduler sees to it."""
        return replace(self, spec=replace(self.spec, wait_for=dict(homes)))

    def script(self, after: Mapping[str, Condition] | None = None) -> str:
        """What sbatch will be given; "" without SLURM."""
        return batch_script(self.spec, self.profile, self._wish(after))

    def submit(self, after: Mapping[str, Condition] | None = None, *, new_code: bool = False) -> str:
        """Make the home, with the code and the recipe in it, and submit. Returns the job id.

        Of a job that is refused nothing is left, but for what was there before.
        """
        if self.profile.scheduler == "slurm":
            slurm.check_answers()
        elif self.profile.scheduler == "local":
            check_interpreter(self.profile)
        first_new = _first_missing(self.home)
        try:
            with sole_launch(self.home):
                if len(submissions(self.home)) > self.num_before:
                    raise InputError(f"{self.home}: launched by somebody else just now; look with `pomscale runs`")
                self.write_home(new_code=new_code)
                return submit(self.spec, self.profile, self._wish(after))
        except Exception:
            if first_new is not None and not (self.home / JOBS_FILE).exists():
                _take_away(self.home, first_new)
            raise

    def _wish(self, after: Mapping[str, Condition] | None) -> Wish:
        return Wish(self.time_limit, after or {}, self.array, self.gpus_per_node)

    def write_home(self, *, new_code: bool = False) -> None:
        """All of it but job.json."""
        make_folder(self.home)
        freeze(self.home, new_code=new_code)
        if self.recipe is not None:
            make_folder((self.home / RECIPE_FILE).parent)
            write_text(self.home / RECIPE_FILE, dump_recipe(self.recipe))
        keep(self.home / LAUNCH_FILE, replace(self.launched_as, gpus_per_node=self.gpus_per_node))


def _first_missing(folder: Path) -> Path | None:
    """The topmost of the folders that would have to be made for this one."""
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing


def _take_away(home: Path, first_new: Path) -> None:
    """And the folders above it up to first_new, unless another launch has put something there meanwhile."""
    shutil.rmtree(home, ignore_errors=True)
    folder = home
    while folder != first_new:
        folder = folder.parent
        try:
            folder.rmdir()
        except OSError:
            return


class How(TypedDict, total=False):
    """gpus_per_node, ranks_per_node, time_limit: instead of the profile's. to_come: absolute paths of datasets and runs
    that jobs before this one make. replacing: the job that waits in this home will be cancelled before."""

    num_nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    time_limit: str | None
    command_line: Sequence[str]
    to_come: Collection[Path]
    replacing: bool


def prepare_train(
    path: Path, overrides: Sequence[str], profile: ClusterProfile, cluster_name: str, **how: Unpack[How]
) -> Prepared:
    """A training run, whose home is its run folder. InputError, with the remedy, for whatever is wrong."""
    recipe = load_train_recipe(path, list(overrides))
    check_is_one_run(recipe, path)
    return prepare_run(recipe, profile, cluster_name, **how)


def prepare_run(
    recipe: TrainRecipe,
    profile: ClusterProfile,
    cluster_name: str,
    *,
    num_nodes: int = 1,
    gpus_per_node: int | None = None,
    ranks_per_node: int | None = None,
    time_limit: str | None = None,
    command_line: Sequence[str] = (),
    to_come: Collection[Path] = (),
    replacing: bool = False,
) -> Prepared:
    """As prepare_train, of a recipe that has been read."""
    check_time_limit(profile, time_limit)
    for evaluation in recipe.evaluations:
        try:
            check_time_limit(profile, evaluation.time_limit)
        except InputError as error:
            raise InputError(f"evaluations: {evaluation.name}: {error}") from error
    num_ranks = _ranks_per_node(profile, gpus_per_node, ranks_per_node)
    dataset = check_training_data(recipe, profile, to_come)
    plan = check_machine(recipe, profile, num_nodes, num_nodes * num_ranks, dataset)
    home = run_home(recipe, profile)
    if not replacing:
        check_not_in_queue(home)
    check_run_folder(home, recipe)
    wandb, notes = _wandb(recipe.monitoring.wandb, profile, home)
    monitoring = recipe.monitoring.model_copy(update={"wandb": wandb})
    resolved = recipe.model_copy(update={"output": str(home.parent), "monitoring": monitoring})
    spec = JobSpec(
        home=str(home),
        name=recipe.name,
        commands=[["train", str(home / RECIPE_FILE)]],
        cwd=str(Path.cwd()),
        num_nodes=num_nodes,
        ranks_per_node=num_ranks,
        ranks_by=profile.ranks_by,
        environment=_environment(profile),
        max_idle_requeues=profile.max_idle_requeues,
        is_run=True,
        evaluations=bool(recipe.evaluations),
    )
    launched = _launched_as(RECIPE_FILE, profile, cluster_name, num_nodes, time_limit, command_line)
    return Prepared(spec, profile, launched, resolved, notes, tuple(plan), None, gpus_per_node, len(submissions(home)))


def prepare_encode(
    path: Path,
    overrides: Sequence[str],
    profile: ClusterProfile,
    cluster_name: str,
    *,
    array: int | None = None,
    num_nodes: int = 1,
    gpus_per_node: int | None = None,
    ranks_per_node: int | None = None,
    time_limit: str | None = None,
    command_line: Sequence[str] = (),
    to_come: Collection[Path] = (),
    replacing: bool = False,
    home: Path | None = None,
) -> Prepared:
    """An encode, by an array of tasks or by the ranks of one job. A task has one rank, and one GPU where there are any.

    home: default runs/encode-NAME. The dataset's folder is that of the recipe, relative to this folder and not to the
    profile's scratch: `data.path` of who trains on it names it in the same way. The rest: see How. Raises as
    prepare_train.
    """
    check_time_limit(profile, time_limit)
    recipe = load_encode_recipe(path, list(overrides))
    check_source(recipe, to_come)
    if gpus_per_node is None and ranks_per_node is None:
        gpus_per_node = min(profile.gpus_per_node, 1)
        ranks_per_node = 1
    num_ranks = _ranks_per_node(profile, gpus_per_node, ranks_per_node)
    home = home or resolved_output(RUNS, profile) / f"encode-{recipe.name}"
    if not replacing:
        check_not_in_queue(home)
    check_encode_home(home, recipe)
    wandb, notes = _wandb(recipe.wandb, profile, home)
    spec = JobSpec(
        home=str(home),
        name=home.name,
        commands=[["data", "encode", str(home / RECIPE_FILE)]],
        cwd=str(Path.cwd()),
        num_nodes=num_nodes,
        ranks_per_node=num_ranks,
        ranks_by=profile.ranks_by,
        environment=_environment(profile),
        max_idle_requeues=profile.max_idle_requeues,
    )
    launched = _launched_as(RECIPE_FILE, profile, cluster_name, num_nodes, time_limit, command_line)
    resolved = recipe.model_copy(update={"wandb": wandb})
    return Prepared(spec, profile, launched, resolved, notes, (), array, gpus_per_node, len(submissions(home)))


def prepare_commands(
    name: str,
    home: Path,
    commands: list[list[str]],
    profile: ClusterProfile,
    cluster_name: str,
    *,
    num_nodes: int = 1,
    gpus_per_node: int | None = None,
    ranks_per_node: int | None = None,
    time_limit: str | None = None,
    command_line: Sequence[str] = (),
    replacing: bool = False,
) -> Prepared:
    """Commands of pomscale, one after another; all ranks run them all. commands: words after `pomscale`, for each."""
    check_time_limit(profile, time_limit)
    if not replacing:
        check_not_in_queue(home)
    spec = JobSpec(
        home=str(home.absolute()),
        name=name,
        commands=commands,
        cwd=str(Path.cwd()),
        num_nodes=num_nodes,
        ranks_per_node=_ranks_per_node(profile, gpus_per_node, ranks_per_node),
        ranks_by=profile.ranks_by,
        environment=_environment(profile),
        max_idle_requeues=profile.max_idle_requeues,
    )
    launched = _launched_as(None, profile, cluster_name, num_nodes, time_limit, command_line)
    return Prepared(spec, profile, launched, gpus_per_node=gpus_per_node, num_before=len(submissions(home)))


def resolved_output(output: str, profile: ClusterProfile) -> Path:
    """Where a folder of runs lies: a relative one below the profile's scratch, if it has one. Absolute."""
    scratch = "" if profile.scratch is None else expanded(profile.scratch, "scratch")
    return Path(scratch, output).absolute()


def run_home(recipe: TrainRecipe, profile: ClusterProfile) -> Path:
    """The run folder, absolute."""
    return resolved_output(recipe.output, profile) / recipe.name


def in_queue(home: Path) -> Submission | None:
    """The submission that waits or runs in this home."""
    if not home.is_dir() or summarize({home: home.name}).runs[0].state not in LIVE:
        return None
    return next(iter(submissions(home)[-1:]), None)


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
    """Of every rank. What the profile says by name wins over what follows from it."""
    follows = {}
    if profile.network_interface is not None:
        follows = {name: profile.network_interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    if profile.offline:
        follows["HF_HUB_OFFLINE"] = "1"  # weights come from the cache at once, not after requests that time out
    return {**follows, **profile.environment}


def _wandb(config: WandbConfig, profile: ClusterProfile, home: Path) -> tuple[WandbConfig, tuple[str, ...]]:
    if config.mode != "online" or not profile.offline:
        return config, ()
    note = f"wandb is offline, since these nodes have no internet: `pomscale runs sync {home}` uploads from here"
    return config.model_copy(update={"mode": "offline"}), (note,)


def _launched_as(
    recipe: str | None,
    profile: ClusterProfile,
    cluster_name: str,
    num_nodes: int,
    time_limit: str | None,
    command_line: Sequence[str],
) -> LaunchedAs:
    return LaunchedAs(recipe, cluster_name, profile.model_dump(mode="json"), num_nodes, time_limit, list(command_line))
