"""What `pomscale cluster check` says of what was found: the remedy is there whenever something is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.findings import (
    Finding,
    name_findings,
    rank_findings,
    requeue_finding,
    signal_finding,
    slurm_findings,
    world_findings,
)
from pomscale.config.cluster import ClusterProfile
from pomscale.runs.cluster_facts import RankFacts, WorldFacts

PARTITION = {"PartitionName": "gpu", "State": "UP", "MaxTime": "20:00:00", "TotalNodes": "8"}
FOLDERS = {"runs": "/scratch/runs/check/facts", "temporary": "/tmp", "home": "/home/me"}
WORLD = WorldFacts(
    num_ranks=4,
    join_s=1.0,
    problem=None,
    warnings=[],
    matmul_tflops=[700.0, 690.0],
    across_gb_per_s=40.0,
    inside_gb_per_s={"n1": 200.0, "n2": 180.0},
    seen_after_s={"n1": 0.1, "n2": 0.2},
    clock_s={"n1": 0.0, "n2": 0.002},
)


def profile(**changes: Any) -> ClusterProfile:
    values = {
        "kind": "cluster",
        "scheduler": "slurm",
        "gpus_per_node": 2,
        "gpu": "h100",
        "cpus_per_node": 16,
        "time_limit": "20:00:00",
    }
    return ClusterProfile.model_validate({**values, **changes})


def ranks() -> dict[int, RankFacts]:
    """Two nodes of two GPUs, in good health."""
    return {
        rank: RankFacts(
            rank,
            f"n{rank // 2 + 1}",
            "3.11.7",
            "/venv/bin/python",
            "2.11.0",
            "2.28.3",
            ("NVIDIA H100 80GB HBM3", f"GPU-{rank}"),
            2,
            8,
            ["lo", "eth0", "ib0"],
            FOLDERS if rank % 2 == 0 else {},
            dict.fromkeys(FOLDERS, 1.0) if rank % 2 == 0 else {},
        )
        for rank in range(4)
    }


def found(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (one for one in findings if one.subject == subject)
    return finding


def judged(facts: dict[int, RankFacts], subject: str, **changes: Any) -> Finding:
    return found(rank_findings(facts, 4, profile(**changes), Path("/scratch/runs")), subject)


def test_a_healthy_cluster_is_ok_throughout() -> None:
    findings = [
        *slurm_findings(profile(), {"SLURM_VERSION": "24.05", "AccountingStorageType": "slurmdbd"}, {"gpu": PARTITION}),
        requeue_finding({"Requeue": "1"}),
        *rank_findings(ranks(), 4, profile(network_interface="ib0"), Path("/scratch/runs")),
        *world_findings(WORLD, has_gpus=True),
        signal_finding(4, 4, 0.4, ""),
    ]
    assert {finding.status for finding in findings} == {"ok"}
    assert found(findings, "GPUs").found == "4 x NVIDIA H100 80GB HBM3, one for each rank"
    assert found(findings, "folder of runs").found == "/scratch/runs: 1 GB/s per node"
    assert found(findings, "clocks").found == "at most 2 ms apart"


@pytest.mark.parametrize(
    ("changes", "partition", "status", "words"),
    [
        ({}, {}, "FAILED", "no such partition"),
        ({}, {"State": "DOWN"}, "FAILED", "gpu is DOWN"),
        ({}, {"MaxTime": "2:00:00"}, "FAILED", "gpu allows 2:00:00, the profile asks for 20:00:00"),
        ({"qos": "long"}, {"MaxTime": "2:00:00"}, "warning", "gpu allows 2:00:00"),
        ({}, {"MaxTime": "UNLIMITED"}, "ok", "at most UNLIMITED"),
        ({}, {"MaxTime": "1-00:00:00"}, "ok", "at most 1-00:00:00"),
    ],
)
def test_partition(changes: dict[str, Any], partition: dict[str, str], status: str, words: str) -> None:
    whole = {**PARTITION, **partition} if partition else {}
    finding = found(slurm_findings(profile(**changes), {}, {"gpu": whole}), "partition")
    assert finding.status == status
    assert words in finding.found
    assert bool(finding.remedy) == (status != "ok")


def test_jobs_that_may_not_start_again() -> None:
    assert requeue_finding({"Requeue": "0"}).status == "FAILED"


def test_ranks_that_are_silent_or_differ() -> None:
    facts = ranks()
    del facts[3]
    assert judged(facts, "ranks") == Finding("ranks", "FAILED", "no report from rank 3 of 4", "see the job above")
    facts = ranks()
    facts[2] = replace(facts[2], torch="2.10.0")
    assert judged(facts, "torch").status == "FAILED"
    assert judged(facts, "torch").found == "2.11.0, NCCL 2.28.3 on n1, n2; 2.10.0, NCCL 2.28.3 on n2"


def test_gpus_that_are_absent_shared_or_others_than_the_profile_says() -> None:
    facts = ranks()
    facts[2] = replace(facts[2], gpu=None)
    assert judged(facts, "GPUs").found == "torch sees none on n2"
    facts = ranks()
    facts[1] = replace(facts[1], gpu=facts[0].gpu)
    assert judged(facts, "GPUs").found == "one GPU for ranks 0, 1 on n1"
    assert judged(ranks(), "GPUs", gpu="a100").status == "warning"
    assert judged(facts, "GPUs", gpus_per_node=0, ranks_per_node=2, gpu=None).status == "ok"


def test_ranks_bound_to_too_few_cores() -> None:
    facts = ranks()
    facts[3] = replace(facts[3], num_cores=1)
    finding = judged(facts, "cores")
    assert (finding.status, finding.found) == ("warning", "rank 3 on n2 may run on 1, not on 8")


def test_an_interface_that_a_node_lacks() -> None:
    finding = judged(ranks(), "network interface", network_interface="ib1")
    assert (finding.status, finding.found) == ("FAILED", "n1 has no ib1, but lo, eth0, ib0")


@pytest.mark.parametrize(
    ("what", "subject", "status"),
    [
        ("runs", "folder of runs", "FAILED"),
        ("temporary", "temporary folder", "warning"),
        ("home", "home folder", "warning"),
    ],
)
def test_folders_that_cannot_be_written_or_are_slow(what: str, subject: str, status: str) -> None:
    facts = ranks()
    facts[0] = replace(facts[0], cannot_write={what: "Read-only file system"})
    finding = judged(facts, subject)
    assert (finding.status, finding.found) == (status, "n1: Read-only file system")
    facts[0] = replace(facts[0], cannot_write={}, write_gb_per_s={**facts[0].write_gb_per_s, what: 0.01})
    assert judged(facts, subject).status == ("ok" if what == "home" else "warning")


def test_a_local_disk_that_the_profile_names_must_be_there() -> None:
    facts = ranks()
    facts[0] = replace(facts[0], cannot_write={"temporary": "No such file or directory"})
    assert judged(facts, "temporary folder", local_disk="$JOBSCRATCH").status == "FAILED"


def test_internet_is_needed_unless_the_profile_says_offline() -> None:
    facts = ranks()
    facts[2] = replace(facts[2], internet="https://api.wandb.ai: no answer")
    finding = judged(facts, "internet")
    assert finding.status == "FAILED"
    assert "offline: true" in finding.remedy
    assert judged(facts, "internet", offline=True).status == "ok"


def test_ranks_that_do_not_find_together() -> None:
    (finding,) = world_findings(None, has_gpus=True)
    assert finding.status == "FAILED"
    assert "network_interface" in finding.remedy


@pytest.mark.parametrize(
    ("change", "subject", "status"),
    [
        ({"problem": "rank 2 on n2: a matrix product is wrong"}, "preflight", "FAILED"),
        ({"warnings": ["rank 3 on n2: writes 0.1 GB/s, 10% of the median"]}, "slow rank", "warning"),
        ({"across_gb_per_s": 1.0}, "all-reduce across nodes", "warning"),
        ({"inside_gb_per_s": {"n1": 200.0, "n2": 3.0}}, "all-reduce inside nodes", "warning"),
        ({"seen_after_s": {"n1": 0.1, "n2": None}}, "shared folder", "FAILED"),
        ({"seen_after_s": {"n1": 0.1, "n2": 12.0}}, "shared folder", "warning"),
        ({"clock_s": {"n1": 0.0, "n2": -3.0}}, "clocks", "warning"),
    ],
)
def test_what_the_ranks_find_together(change: dict[str, Any], subject: str, status: str) -> None:
    finding = found(world_findings(replace(WORLD, **change), has_gpus=True), subject)
    assert finding.status == status
    assert finding.remedy


def test_on_cpus_no_speed_is_asked_for_and_one_node_shares_with_nobody() -> None:
    slow = replace(WORLD, across_gb_per_s=None, inside_gb_per_s={"n1": 0.1}, clock_s={"n1": 0.0})
    findings = world_findings(slow, has_gpus=False)
    assert {finding.status for finding in findings} == {"ok"}
    assert not {"all-reduce across nodes", "shared folder", "clocks"} & {finding.subject for finding in findings}


def test_signals_that_do_not_arrive() -> None:
    assert signal_finding(3, 4, 60.0, "").found == "USR2 reached 3 of 4 ranks"
    assert signal_finding(0, 4, None, "scancel: not allowed").found == "scancel: not allowed"
    assert {signal_finding(3, 4, 60.0, "").status, signal_finding(0, 4, None, "").status} == {"FAILED"}


def test_a_name_that_does_not_resolve_is_a_finding() -> None:
    why = "the first node, n1, cannot be found by its name on n2: Name or service not known"
    for reason in (f"rank 1 on n2: {why}; and so on", f"SLURM says FAILED; it has printed: error: {why}; and so on"):
        (finding,) = name_findings(reason)
        assert finding.status == "FAILED"
        assert finding.found.endswith(why)
        assert "/etc/hosts" in finding.remedy
    assert name_findings("rank 1 on n2: ValueError: no such thing") == []
