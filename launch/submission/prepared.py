"""A job that has been checked and can be submitted as it stands."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.record.job import Condition, JobSpec, LaunchedAs, keep, read_submissions, sole_launch
from launch.scheduler import slurm
from launch.submission.checks import check_interpreter
from launch.submission.freeze import freeze
from launch.submission.job_script import SubmitOptions, max_parallel_tasks
from launch.submission.submit import batch_script, submit
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder, write_text
from pomscale.config.cluster import ClusterProfile
from pomscale.config.encode import EncodeRecipe
from pomscale.config.load import dump_recipe
from pomscale.config.train import TrainRecipe
from pomscale.runs.layout import JOBS_FILE, LAUNCH_FILE, LAUNCHED_RECIPE_FILE


@dataclass(frozen=True)
class Prepared:
    """A job that has been checked, with all that its submission needs.

    recipe: resolved, as the job will read it; None for a job of commands. notes: lines for the user. plan: lines of the
    memory plan, none if the GPU is not known. num_before: earlier submissions of the same job folder. refusals: in a
    dry run, problems for which the job would be refused. The rest: see SubmitOptions.
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
    refusals: tuple[str, ...] = ()

    @property
    def job_folder(self) -> Path:
        return Path(self.spec.job_folder)

    @property
    def time_limit(self) -> str | None:
        return self.launched_as.time_limit

    @property
    def tasks(self) -> str:
        """The tasks of an array as a phrase before their size, such as "9 tasks, at most 3 at once, of "; or ""."""
        if self.array in (None, 1):
            return ""
        most = max_parallel_tasks(self.profile, self.array)
        limit = "" if most == self.array or self.profile.scheduler != "slurm" else f", at most {most} at once,"
        return f"{self.array} tasks{limit} of "

    def waiting_for(self, job_folders: Mapping[str, Condition]) -> Prepared:
        """Return this job such that it waits for the jobs in these folders itself; see JobSpec.wait_for."""
        return replace(self, spec=replace(self.spec, wait_for=dict(job_folders)))

    def script(self, after: Mapping[str, Condition] | None = None) -> str:
        """Return the script that sbatch will be given; "" without SLURM."""
        return batch_script(self.spec, self.profile, self._options(after))

    def submit(self, after: Mapping[str, Condition] | None = None, *, new_code: bool = False) -> str:
        """Write the job folder, with the code and the recipe in it, and submit. Return the job id.

        If the job is refused, everything that was written is removed again.

        Args:
            after: Condition by id of the SLURM jobs that this one waits for.
            new_code: If the job has started before, replace its frozen copy of the code by this checkout.
        """
        if self.profile.scheduler == "slurm":
            slurm.check_answers()
        elif self.profile.scheduler == "local":
            check_interpreter(self.profile)
        first_new = _first_missing(self.job_folder)
        try:
            with sole_launch(self.job_folder):
                if len(read_submissions(self.job_folder)) > self.num_before:
                    raise InputError(
                        f"{self.job_folder}: another launch has just submitted it; look with `pomscale runs`"
                    )
                self.write_job_folder(new_code=new_code)
                return submit(self.spec, self.profile, self._options(after))
        except Exception:
            if first_new is not None and not (self.job_folder / JOBS_FILE).exists():
                _remove_new(self.job_folder, first_new)
            raise

    def _options(self, after: Mapping[str, Condition] | None) -> SubmitOptions:
        return SubmitOptions(self.time_limit, after or {}, self.array, self.gpus_per_node)

    def write_job_folder(self, *, new_code: bool = False) -> None:
        """Write everything but job.json."""
        make_folder(self.job_folder)
        freeze(self.job_folder, new_code=new_code)
        if self.recipe is not None:
            make_folder((self.job_folder / LAUNCHED_RECIPE_FILE).parent)
            write_text(self.job_folder / LAUNCHED_RECIPE_FILE, dump_recipe(self.recipe))
        keep(self.job_folder / LAUNCH_FILE, replace(self.launched_as, gpus_per_node=self.gpus_per_node))


def _first_missing(folder: Path) -> Path | None:
    """Return the topmost of the folders that would have to be made for this one."""
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing


def _remove_new(job_folder: Path, first_new: Path) -> None:
    """Remove a job folder, and the folders above it up to first_new unless another launch has put something there."""
    shutil.rmtree(job_folder, ignore_errors=True)
    folder = job_folder
    while folder != first_new:
        folder = folder.parent
        try:
            folder.rmdir()
        except OSError:
            return
