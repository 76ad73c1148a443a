"""`pomscale launch` on a real SLURM: what is submitted runs as without it, and what is refused leaves nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch.record.job import JobSpec, LaunchedAs, read_starts, read_submissions
from launch.record.result import final_verdict
from launch.submission.prepare import JobRequest, prepare_commands
from pomscale.config.load import load_cluster, load_train_recipe
from pomscale.shards.schema import read_manifest
from support import running
from support.cluster import SlurmCluster
from support.launched import OVERRIDES, hold, launch, pomscale
from support.paths import RECIPES
from support.running import GLOBAL_BATCH, assert_same_run, train, write_tiny_recipe

# What a shell inside a job, of srun or of torchrun, has in its environment: none of it may reach the job.
WITH_AND_WITHOUT_ACCOUNTING = True
INSIDE_A_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "99",
    "SLURM_NTASKS_PER_NODE": "99",
    "SLURM_CPUS_PER_TASK": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SBATCH_PARTITION": "nowhere",
    "RANK": "9",
    "WORLD_SIZE": "99",
    "MASTER_ADDR": "nowhere",
    "TORCHELASTIC_RUN_ID": "another",
}


def jobs_in_queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run(["squeue", "-h", "-o", "%i"]).split()


@pytest.mark.slow
def test_two_nodes_train_as_four_processes_do_without_slurm(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in INSIDE_A_JOB.items():
        monkeypatch.setitem(slurm.environment, name, value)
    slurm.profile(tmp_path)  # two ranks per node
    short = ["monitoring.wandb.mode=disabled", f"training.total_samples={30 * GLOBAL_BATCH}"]
    held = hold(slurm, monkeypatch, tmp_path / "held", 20 * GLOBAL_BATCH)
    run = launch(slurm, tmp_path, digits, *short)
    for name in INSIDE_A_JOB:
        monkeypatch.delitem(slurm.environment, name)

    launched = LaunchedAs.read(run.folder / "launch.json")
    assert (launched.cluster, launched.num_nodes) == (str(tmp_path / "test.yaml"), 2)
    assert launched.command_line[1:3] == ["launch", str(tmp_path / "tiny.yaml")]
    (submission,) = read_submissions(run.folder)
    assert (submission.job_id, submission.scheduler, submission.num_nodes) == (run.job_id, "slurm", 2)
    assert JobSpec.read(run.folder / "job.json").num_ranks == 4
    resolved = load_train_recipe(run.folder / "launch" / "recipe.yaml")
    assert resolved.optimizer.lr == 3e-4

    # While it waits or runs, the same launch is refused; and what it runs is not the checkout any more.
    again = ["launch", str(tmp_path / "tiny.yaml"), "--cluster", str(tmp_path / "test.yaml")]
    told = pomscale(slurm, *again, *OVERRIDES, expect=2)
    assert f"already, job {run.job_id}; watch it with `pomscale watch {run.folder}`" in told
    rank = wait_for_rank(run)
    assert rank.environ()["PYTHONPATH"].split(":")[0] == str(run.folder / "code")
    assert {rank.environ()[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {"4", "2"}
    held.unlink()

    (start,) = run.finish()
    assert len(set(start.record.hosts)) == 2
    assert json.loads((run.folder / "code.json").read_text()) == json.loads((run.folder / "code/code.json").read_text())
    without = tmp_path / "without"
    without.mkdir()
    recipe = write_tiny_recipe(without, digits)
    train(recipe, *OVERRIDES, *short, num_processes=4)
    assert_same_run(run.folder, without / "runs" / "tiny")


def wait_for_rank(run: Any) -> Any:
    deadline_s = time.monotonic() + 240
    while True:
        try:
            return run.rank(3)
        except AssertionError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def test_an_encode_as_an_array(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    slurm.profile(tmp_path, ranks_per_node=1, cpus_per_node=1)
    words = ["launch", str(RECIPES / "data" / "digits.yaml"), "--cluster", str(tmp_path / "test.yaml"), "--array", "3"]
    overrides = [f"source.path={digits}/digits/heldout", f"output={tmp_path}/latents", "shard_samples=128"]
    done = running.pomscale(*words, *overrides, cwd=tmp_path, env=slurm.environment)
    job_folder = tmp_path / "runs" / "encode-digits"
    (submission,) = read_submissions(job_folder)
    assert submission.num_tasks == 3
    assert f"{submission.job_id}, an array of 3 tasks" in done.stdout
    for task in range(3):
        slurm.wait_for(f"{submission.job_id}_{task}", "COMPLETED")
    assert read_manifest(tmp_path / "latents").num_samples == read_manifest(digits / "latents" / "heldout").num_samples
    assert sorted(path.name for path in (job_folder / "attempts").iterdir()) == [
        f"{submission.job_id}_{i}-0" for i in range(3)
    ]


@pytest.mark.parametrize("where", ["SBATCH_EXPORT", "SLURM_EXPORT_ENV", "profile"])
def test_a_site_that_exports_nothing(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    changes: dict[str, Any] = {"sbatch": {"export": "NONE"}} if where == "profile" else {}
    if not changes:
        monkeypatch.setenv(where, "NONE")
    profile = load_cluster(slurm.profile(tmp_path, ranks_per_node=1, **changes))
    job = prepare_commands("job", tmp_path / "job", [["completion", "bash"]], JobRequest(profile, "test", num_nodes=2))
    slurm.wait_for(job.submit(), "COMPLETED")
    (start,) = read_starts(tmp_path / "job")
    assert start.verdict is not None
    assert start.verdict.action == "done"


def test_a_job_waits_for_another_and_falls_with_it(slurm: SlurmCluster, tmp_path: Path) -> None:
    profile = load_cluster(slurm.profile(tmp_path, ranks_per_node=1))
    fails, waits, follows = (
        prepare_commands(name, tmp_path / name, [["data", "info", str(tmp_path)]], JobRequest(profile, "test"))
        for name in ("fails", "waits", "follows")
    )
    first = fails.submit()
    second = waits.submit(after={first: "ok"})
    third = follows.submit(after={first: "any"})
    slurm.wait_for(first, "FAILED")
    slurm.wait_for(second, "CANCELLED")
    slurm.wait_for(third, "FAILED")  # of its own fault: there is no dataset
    assert not (tmp_path / "waits" / "attempts").exists()
    assert (tmp_path / "follows" / "attempts" / f"{third}-0" / "verdict.json").is_file()


def test_a_job_does_not_begin_after_one_that_failed_and_was_forgotten(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SLURM 22.05 takes a job that it does not know for one that has succeeded."""
    profile = load_cluster(slurm.profile(tmp_path, ranks_per_node=2))
    words = [["data", "info", str(tmp_path)]]
    fails, follows = (prepare_commands(name, tmp_path / name, words, JobRequest(profile, "test")) for name in "ab")
    slurm.wait_for(fails.submit(), "FAILED")
    job_id = follows.waiting_for({str(tmp_path / "a"): "ok"}).submit(after={"4242": "ok"})
    slurm.wait_for(job_id, "FAILED")
    verdict = final_verdict(tmp_path / "b")
    assert verdict is not None
    assert verdict.reason.startswith(f"not begun, since the job before it ({tmp_path}/a) did not succeed: ")
    assert not list((tmp_path / "b" / "logs").glob("*")), "no rank has run anything"


def test_a_sweep_submits_what_is_left(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, digits)
    with recipe.open("a") as file:
        file.write("sweep: {optimizer.lr: [1e-3, 3e-4], seed: [0]}\n")
    slurm.profile(tmp_path, cpus_per_node=8, ranks_per_node=1)
    slurm.run(["sbatch", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 600"], cwd=tmp_path)
    words = ["launch", str(recipe), "--cluster", str(tmp_path / "test.yaml")]
    names = ["tiny.lr=0.001-seed=0", "tiny.lr=0.0003-seed=0"]

    told = pomscale(slurm, *words)
    jobs = {name: read_submissions(tmp_path / "runs" / name)[-1].job_id for name in names}
    for name, job_id in jobs.items():
        assert any(line.split()[0] == job_id and line.endswith(name) for line in told.splitlines())
        assert slurm.job_state(job_id) == "PENDING"
    assert load_train_recipe(tmp_path / "runs" / names[1] / "launch" / "recipe.yaml").monitoring.wandb.group == "tiny"

    assert pomscale(slurm, *words).endswith("nothing is left to submit\n")
    slurm.run(["scancel", jobs[names[0]]])
    slurm.wait_for(jobs[names[0]], "CANCELLED")
    assert "1 of 2 runs" in pomscale(slurm, *words)
    assert [len(read_submissions(tmp_path / "runs" / name)) for name in names] == [2, 1]


def test_a_users_options_for_sbatch_are_not_those_of_the_job(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or another account would be charged than the profile says, without a word."""
    of_the_user = {
        "SBATCH_ACCOUNT": "elsewhere",
        "SBATCH_PARTITION": "high",
        "SBATCH_TIMELIMIT": "9",
        "SRUN_DEBUG": "9",
    }
    for name, value in of_the_user.items():
        monkeypatch.setitem(slurm.environment, name, value)
    recipe, profile = write_tiny_recipe(tmp_path, digits), slurm.profile(tmp_path, account="lab", ranks_per_node=1)
    words = ["launch", str(recipe), "--cluster", str(profile), "--set", "sbatch.hold="]
    told = [pomscale(slurm, *words, *more) for more in (["--dry-run"], [])]
    for name, value in of_the_user.items():
        assert [one.count(f"{name}={value}") for one in told] == [1, 1]
    (job_id,) = jobs_in_queue(slurm)
    shown = set(slurm.run(["scontrol", "show", "job", job_id]).split())
    assert {"Account=lab", "Partition=low", "TimeLimit=00:40:00"} <= shown


# --- refused ---------------------------------------------------------------------------------------------------------


def launch_refused(cluster: SlurmCluster, folder: Path, digits: Path, *options: str, expect: int) -> str:
    """What is said; nothing is left of it, neither here nor in the queue."""
    recipe = write_tiny_recipe(folder, digits)
    words = ["launch", str(recipe), "--cluster", str(folder / "test.yaml"), *options]
    told = pomscale(cluster, *words, expect=expect)
    if expect:
        assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in told
    assert not (folder / "runs").exists()
    return told


def test_an_account_that_may_not_be_charged(slurm_accounted: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    slurm_accounted.profile(tmp_path, account="somebody-else")
    told = launch_refused(slurm_accounted, tmp_path, digits, expect=2)
    assert "sbatch refuses this job: Batch job submission failed: Invalid account" in told
    assert jobs_in_queue(slurm_accounted) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"constraint": "nowhere"}, "Invalid feature specification"),
        ({"sbatch": {"gres": "nowhere:1"}}, "Invalid generic resource (gres) specification"),
        ({"sbatch": {"nowhere": "1"}}, "unrecognized option '--nowhere=1'"),
    ],
)
def test_sbatch_has_the_last_word(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, changes: dict[str, Any], words: str
) -> None:
    slurm.profile(tmp_path, **changes)
    told = launch_refused(slurm, tmp_path, digits, expect=2)
    assert "sbatch refuses this job: " in told
    assert words in told
    assert jobs_in_queue(slurm) == []
    assert words in launch_refused(slurm, tmp_path, digits, "--dry-run", expect=0)


def test_an_array_that_is_too_large(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    slurm.profile(tmp_path, ranks_per_node=1)
    words = ["launch", str(RECIPES / "data" / "digits.yaml"), "--cluster", str(tmp_path / "test.yaml")]
    overrides = [f"source.path={digits}/digits/heldout", f"output={tmp_path}/latents"]
    told = pomscale(slurm, *words, "--array", "1002", *overrides, expect=2)
    assert "--array 1002: give at most 1001 tasks (MaxArraySize)" in told
    assert "--nodes" not in told


def test_a_controller_that_is_down(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    slurm.profile(tmp_path)
    slurm.kill_controller()
    try:
        told = launch_refused(slurm, tmp_path, digits, expect=1)
    finally:
        slurm.start_controller()
    assert "slurmctld" in told.lower() or "slurm controller" in told.lower()
