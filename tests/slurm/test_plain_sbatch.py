"""slurm/train.sbatch: no submitit, the same guards, supervisor and life cycle."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.record.job import read_submissions
from support.cluster import ACCOUNT, SlurmCluster
from support.launched import OVERRIDES, Launched, hold
from support.paths import ROOT
from support.running import GLOBAL_BATCH, outcome, write_tiny_recipe

WITH_AND_WITHOUT_ACCOUNTING = True
pytestmark = pytest.mark.slow

OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]


def sbatch(slurm: SlurmCluster, tmp_path: Path, *words: str) -> str:
    account = [f"--account={ACCOUNT}"] if slurm.accounting else []
    options = [*OPTIONS, *account, f"--output={tmp_path}/job.log"]
    return slurm.run(["sbatch", "--parsable", *options, "slurm/train.sbatch", *words], cwd=ROOT).strip()


def test_it_saves_requeues_and_finishes(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(slurm, monkeypatch, tmp_path / "held")
    recipe = write_tiny_recipe(tmp_path, digits)
    run = Launched(slurm, sbatch(slurm, tmp_path, str(recipe), *OVERRIDES), tmp_path / "runs" / "tiny")
    run.wait_for_samples(30 * GLOBAL_BATCH)
    slurm.run(["scancel", "--signal=USR2", run.job_id])
    run.wait_for_start(2)
    held.unlink()
    starts = run.finish()
    assert [start.verdict and start.verdict.action for start in starts] == ["requeue", "done"]
    assert [submission.job_id for submission in read_submissions(run.folder)] == [run.job_id]
    assert outcome(run.folder)["state"] == "finished"
    assert (run.folder / "code" / "code.json").is_file()


def test_a_wrong_recipe_ends_the_job_before_a_rank_starts(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, digits)
    job_id = sbatch(slurm, tmp_path, str(recipe), "training.global_batch=1", "training.total_samples=9", "schedule={}")
    slurm.wait_for(job_id, "FAILED")
    assert "cannot be shared by 2 ranks" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "runs").exists()
