"""`pomscale cluster check` on a real cluster: all it promises where all is well, and the cause where it is not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.check import CheckReport, check_cluster
from pomscale.config.load import load_cluster
from support.cluster import SlurmCluster
from support.running import run

SUBJECTS = [
    "SLURM",
    "partition",
    "accounting",
    "job",
    "requeue",
    "ranks",
    "Python",
    "torch",
    "GPUs",
    "cores",
    "folder of runs",
    "temporary folder",
    "home folder",
    "internet",
    "rendezvous",
    "computing",
    "all-reduce inside nodes",
    "all-reduce across nodes",
    "shared folder",
    "clocks",
    "signals",
]
SPEEDS = {"slow rank", "cores", "folder of runs", "temporary folder", "home folder"}  # may warn on a busy machine


@pytest.mark.slow
@pytest.mark.parametrize("ranks_by", ["torchrun", pytest.param("srun", marks=pytest.mark.exhaustive)])
def test_a_cluster_that_works(slurm: SlurmCluster, tmp_path: Path, ranks_by: str) -> None:
    settings = ["--set", f"ranks_by={ranks_by}", "--set", f"local_disk={tmp_path}/disk-$SLURM_JOB_ID"]
    done = run([*_command(slurm, tmp_path), *settings], timeout=400, env=slurm.environment, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line[:9].strip() in ("ok", "warning", "FAILED")]
    status = {line[9:33].strip(): line[:9].strip() for line in lines}
    assert [subject for subject in status if subject != "slow rank"] == SUBJECTS
    assert {subject for subject in status if status[subject] != "ok"} <= SPEEDS
    told = re.search(r"job +(\d+) on 127.0.0.1, 127.0.0.2, ", done.stdout)
    assert told is not None
    assert f"{tmp_path}/disk-{told[1]}" in done.stdout
    slurm.wait_for(told[1], "COMPLETED")  # what it wrote was there before SLURM had seen it end
    assert list((tmp_path / "runs").iterdir()) == []  # a check that went well leaves nothing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "/no/such/python"}, "/no/such/python: No such file"),
        ({"setup": ["load_modules || exit 7"]}, "load_modules: command not found"),
    ],
)
def test_a_job_that_cannot_even_start(slurm: SlurmCluster, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    report = _check(slurm, tmp_path, **change)
    assert report.exit_code == 1
    assert _failed(report) == ["job", "ranks"]
    assert words in str(report)
    job = next(finding for finding in report.findings if finding.subject == "job")
    assert words in job.found
    assert words in Path(job.remedy.split()[1]).read_text()


def test_ranks_that_cannot_talk_still_tell_what_they_found(slurm: SlurmCluster, tmp_path: Path) -> None:
    # A rank per node: of two, neither gets as far as its network before the other one has told. Of four, a third might
    # fail, and the job with it, while another one still looks at its disks.
    report = _check(slurm, tmp_path, network_interface="ib7", ranks_per_node=1)
    assert report.exit_code == 1
    assert _failed(report) == ["job", "network interface", "rendezvous"]
    assert "has no ib7, but lo" in str(report)
    assert "correct `network_interface`" in str(report)


@pytest.mark.parametrize("ranks_by", ["srun", "torchrun"])
def test_a_name_that_does_not_resolve(slurm: SlurmCluster, tmp_path: Path, ranks_by: str) -> None:
    names = ["env", "SLURM_JOB_NODELIST=nowhere-[1-2]"]  # to the ranks, instead of the nodes' own
    report = _check(slurm, tmp_path, srun=names, ranks_per_node=1, ranks_by=ranks_by)
    assert _failed(report) == ["job", "names of nodes", "ranks"]
    assert "the first node, nowhere-1, cannot be found by its name on " in str(report)
    assert "/etc/hosts" in str(report)


def test_a_refused_job_is_told_in_sbatchs_words(slurm_accounted: SlurmCluster, tmp_path: Path) -> None:
    report = _check(slurm_accounted, tmp_path, account="nobody")
    assert report.exit_code == 1
    assert _failed(report) == ["job"]
    assert "Invalid account or account/partition combination specified" in str(report)
    assert next(finding.found for finding in report.findings if finding.subject == "accounting") == "works"
    assert not (tmp_path / "runs").exists()


def test_a_partition_that_is_not_there(slurm: SlurmCluster, tmp_path: Path) -> None:
    report = _check(slurm, tmp_path, partition="low,nowhere")
    assert _failed(report) == ["partition", "job"]
    assert "nowhere: no such partition" in str(report)


def test_a_slurm_that_does_not_answer(slurm: SlurmCluster, tmp_path: Path) -> None:
    slurm.kill_controller()
    report = _check(slurm, tmp_path)
    assert report.exit_code == 1
    assert [finding.subject for finding in report.findings] == ["job"]
    assert "is DOWN" in str(report)


def test_ctrl_c_cancels_the_job_that_waits(slurm: SlurmCluster, tmp_path: Path) -> None:
    command = [*_command(slurm, tmp_path), "--set", "sbatch={hold: ''}"]
    with subprocess.Popen(command, env=slurm.environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as check:
        try:
            assert check.stderr is not None
            told = re.match(r"job (\d+): queued", check.stderr.readline())
            assert told is not None
            check.send_signal(signal.SIGINT)
            assert check.wait(timeout=120) == 130
        finally:
            check.kill()
    slurm.wait_for(told[1], "CANCELLED")


def _command(cluster: SlurmCluster, folder: Path) -> list[str]:
    profile = cluster.profile(folder, scratch=str(folder))
    return [sys.executable, "-m", "pomscale", "cluster", "check", str(profile)]


def _check(cluster: SlurmCluster, folder: Path, **changes: Any) -> CheckReport:
    profile = load_cluster(str(cluster.profile(folder, **changes)))
    return check_cluster("test", profile, folder=folder / "runs")


def _failed(report: CheckReport) -> list[str]:
    return [finding.subject for finding in report.findings if finding.status == "FAILED"]
