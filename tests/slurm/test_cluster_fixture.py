"""The cluster of these tests: it is a real one, and nothing of it outlives the process that started it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support import cluster as cluster_module
from support.cluster import SlurmCluster
from support.paths import TESTS
from support.running import wait_until

START = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from support.cluster import SlurmCluster
with SlurmCluster() as cluster:
    job = cluster.submit("trap '' TERM; srun bash -c 'trap \\"\\" TERM; setsid sleep 600' & wait", "--nodes=2")
    cluster.wait_for(job, "RUNNING")
    # The last that begin: each is there after its node's slurmstepd, the script, and srun and its helper.
    while sum(process.info["name"] == "sleep" for process in cluster.processes_of(job)) < 2:
        time.sleep(0.05)
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


def test_nodes_run_jobs_and_slurm_shares_out_their_gpus(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = "srun bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = slurm.submit(script, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", cwd=tmp_path)
    slurm.wait_for(job, "COMPLETED")
    lines = sorted((tmp_path / f"slurm-{job}.out").read_text().splitlines())
    assert lines == ["0 127.0.0.1 0,1", "1 127.0.0.1 0,1", "2 127.0.0.2 0,1", "3 127.0.0.2 0,1"]


def test_jobs_of_one_test_are_gone_in_the_next(slurm: SlurmCluster) -> None:
    stubborn = slurm.submit("trap '' TERM; sleep 600")
    slurm.wait_for(stubborn, "RUNNING")
    slurm.kill_slurmd(slurm.nodes[1])
    slurm.set_node(slurm.nodes[2], "DOWN")
    slurm.reset()
    assert slurm.processes_of(stubborn) == []
    assert slurm.run(["squeue", "-h"]) == ""
    slurm.wait_for(slurm.submit("srun hostname", f"--nodes={len(slurm.nodes)}"), "COMPLETED")


def test_accounting_remembers_what_the_queue_forgot(slurm_accounted: SlurmCluster) -> None:
    job = slurm_accounted.submit("exit 3")
    slurm_accounted.wait_for(job, "FAILED")
    wait_until(
        lambda: "FAILED|3:0" in slurm_accounted.run(["sacct", "-P", "-n", "-o", "state,exitcode", "-j", job]),
        timeout_s=120,
    )
    slurm_accounted.kill_controller()
    slurm_accounted.start_controller(forget_jobs=True)
    assert slurm_accounted.job_state(job) == ""
    assert "FAILED|3:0" in slurm_accounted.run(["sacct", "-P", "-n", "-o", "state,exitcode", "-j", job])


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_tests_are_ended(slurm: SlurmCluster, end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tests:
        assert tests.stdout is not None
        folder = Path(tests.stdout.readline().decode().strip())
        # The daemons, their jobs, and what SLURM starts to watch over these: one slurmstepd per node and step.
        before = cluster_module.processes_in(folder)
        assert len(before) >= 5 + 5 + 3
        tests.send_signal(end)
    wait_until(lambda: not folder.exists(), timeout_s=120)
    wait_until(lambda: not any(map(_is_alive, before)), timeout_s=120)  # one that is ending has no environment any more
    assert cluster_module.processes_in(folder) == []


def test_a_start_that_fails_says_why_and_leaves_nothing(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SlurmCluster()
    write = broken._write_configuration

    def write_nonsense() -> None:
        write()
        with broken.config.open("a") as file:
            file.write("ThisIsNot=AnOption\n")

    monkeypatch.setattr(broken, "_write_configuration", write_nonsense)
    with pytest.raises(RuntimeError, match="ThisIsNot"):
        broken.__enter__()
    assert not broken.folder.exists()
    assert cluster_module.processes_in(broken.folder) == []


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it waits only for its parent."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
