"""One logical run over whatever a cluster does to it: every case on a real SLURM, with real training over gloo."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.scheduler import slurm as commands
from support.cluster import SlurmCluster
from support.launched import (
    NUM_STEPS,
    OVERRIDES,
    Launched,
    assert_every_sample_once,
    excluded,
    hold,
    incarnations,
    launch,
    wandb_ids,
)
from support.running import (
    GLOBAL_BATCH,
    checkpoint_samples,
    damaged_copy,
    losses,
    outcome,
    train,
    wait_until,
    write_tiny_recipe,
)

WITH_AND_WITHOUT_ACCOUNTING = True
pytestmark = pytest.mark.slow

TOTAL = NUM_STEPS * GLOBAL_BATCH
MIDDLE = 20 * GLOBAL_BATCH


@pytest.fixture(autouse=True)
def held(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While it is there, the run does not end by itself. To be removed once the run has been started again."""
    return hold(slurm, monkeypatch, tmp_path / "held")


@pytest.fixture(scope="session")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same run, undisturbed and without SLURM."""
    folder = tmp_path_factory.mktemp("reference")
    train(write_tiny_recipe(folder, digits), *OVERRIDES, "monitoring.wandb.mode=disabled")
    return losses(folder / "runs" / "tiny")


def assert_one_run(run: Launched, reference: dict[int, float], num_starts: int) -> None:
    assert outcome(run.folder)["state"] == "finished"
    assert checkpoint_samples(run.folder) == TOTAL
    assert len(incarnations(run.folder)) == num_starts
    assert len(wandb_ids(run.folder)) == 1
    assert_every_sample_once(run.folder, reference)


def test_a_request_to_stop_is_a_pause(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, reference: dict[int, float], held: Path
) -> None:
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    slurm.run(["scancel", "--signal=USR2", run.job_id])
    run.wait_for_start(2)
    held.unlink()
    first, second = run.finish()
    assert first.verdict is not None
    assert second.verdict is not None
    assert (first.verdict.action, first.verdict.samples) == ("requeue", incarnations(run.folder)[1]["start_samples"])
    assert "SIGUSR2" in first.verdict.reason
    assert second.verdict.action == "done"
    assert_one_run(run, reference, 2)


@pytest.mark.exhaustive  # test_cluster_check.py has a start by torchrun, tests/e2e/test_local_jobs.py the rest
def test_one_task_per_node_with_torchrun(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, reference: dict[int, float], held: Path
) -> None:
    slurm.profile(tmp_path, ranks_by="torchrun")
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    slurm.run(["scancel", "--signal=USR2", run.job_id])
    run.wait_for_start(2)
    held.unlink()
    run.finish()
    assert_one_run(run, reference, 2)


def test_preemption_by_another_job(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, reference: dict[int, float], held: Path
) -> None:
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    other = slurm.submit("sleep 5", "--partition=high", "--nodes=3", "--exclusive", cwd=tmp_path)
    run.wait_for_start(2)
    held.unlink()
    run.finish()
    assert slurm.job_state(other) == "COMPLETED"
    assert_one_run(run, reference, 2)
    first = incarnations(run.folder)[1]
    assert first["start_samples"] >= MIDDLE  # it has saved: nothing was done again


def test_the_time_limit(slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM looks at time limits twice a minute, so its signal may come half a minute early."""
    monkeypatch.setitem(slurm.environment, "UNHURRIED_S", "0.5")
    slurm.profile(tmp_path, signal_lead_s=30, ranks_per_node=1)
    many = f"training.total_samples={40 * TOTAL}"
    words = (many, "checkpoint.every_samples=100000")
    run = launch(slurm, tmp_path, digits, *words, num_nodes=1, options=("--time", "0:20:00"))
    run.wait_for_samples(GLOBAL_BATCH)  # to have something to save, before the limit is near
    elapsed_s = commands.job_states([run.job_id])[run.job_id].elapsed_s
    slurm.run(["scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={int(elapsed_s // 60) + 2}"])
    run.wait_for_start(2, timeout_s=300)
    slurm.run(["scancel", run.job_id])
    first = run.finish("CANCELLED")[0]
    assert first.verdict is not None
    assert first.verdict.action == "requeue"
    assert first.verdict.samples is not None
    assert first.verdict.samples > 0


def test_a_killed_rank_is_started_again_elsewhere(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, reference: dict[int, float], held: Path
) -> None:
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    victim = run.rank(1)
    node = victim.environ()["SLURMD_NODENAME"]
    victim.send_signal(signal.SIGKILL)
    run.wait_for_start(2)
    held.unlink()
    assert excluded(slurm, run.job_id) == node
    first, second = run.finish()
    assert first.verdict is not None
    assert first.verdict.reason == f"rank 1 on {node} was killed by SIGKILL"
    assert node not in second.record.hosts
    assert_one_run(run, reference, 2)


def test_a_node_that_goes_down_and_leaves_a_rank_behind(
    slurm: SlurmCluster,
    tmp_path: Path,
    digits: Path,
    reference: dict[int, float],
    held: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its daemon is dead, so nobody ends the ranks there: they must not write any more."""
    monkeypatch.delitem(slurm.environment, "FORKED_RANKS")  # SIGSTOP is for the rank itself
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    guard, stale = run.rank(0).parent(), run.rank(1)
    node = stale.environ()["SLURMD_NODENAME"]
    stale.suspend()  # a network that is cut: it neither ends nor goes on
    slurm.kill_slurmd(node)
    slurm.set_node(node, "DOWN")
    wait_until(lambda: excluded(slurm, run.job_id) == node, "the node is not excluded", timeout_s=120)
    assert guard is not None
    with suppress(psutil.NoSuchProcess):
        guard.kill()  # as SLURM does after KILL_WAIT_S, for its rank waits for the other; that dies with it
    run.wait_for_start(2)
    run.wait_for_samples(TOTAL // 2)
    stale.resume()
    held.unlink()
    first, second = run.finish()
    assert first.verdict is not None
    assert first.verdict.reason == f"node failure: {node}"
    assert excluded(slurm, run.job_id) == node
    assert node not in second.record.hosts
    assert_one_run(run, reference, 2)


def test_a_failure_of_its_own_is_told_and_not_repeated(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    latents = damaged_copy(digits / "latents" / "train", tmp_path / "latents")
    run = launch(slurm, tmp_path, digits, f"data.path={latents}")
    (only,) = run.finish("FAILED")
    assert only.verdict is not None
    assert only.verdict.action == "fail"
    assert "checksum" in only.verdict.reason.lower() or "crc" in only.verdict.reason.lower(), only.verdict.reason
    assert Path(only.verdict.log).is_file()
    time.sleep(6)  # longer than a requeued job waits
    assert slurm.job_state(run.job_id) == "FAILED"


def test_a_cancelled_job_stays_cancelled(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    """SLURM sends the ranks SIGTERM, as it does before a preemption; but here nothing may start again."""
    run = launch(slurm, tmp_path, digits)
    run.wait_for_samples(MIDDLE)
    # SLURM gives it KILL_WAIT_S: a rank that stands still for as long is killed before it saves.
    wait_until(lambda: checkpoint_samples(run.folder) >= MIDDLE, "not saved in time", timeout_s=120)
    slurm.run(["scancel", run.job_id])
    run.finish("CANCELLED")
    time.sleep(6)
    assert slurm.job_state(run.job_id) == "CANCELLED"
    assert checkpoint_samples(run.folder) >= MIDDLE
