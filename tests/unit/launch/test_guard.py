"""A rank that would not find the others is not even started: its guard says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.guard import _Rank
from launch.node.identity import RankIdentity
from launch.node.signals import SignalForwarder
from launch.record.job import JobSpec, keep
from launch.task import SlurmTask
from pomscale.base import hosts

NODES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nowhere-[1-2].invalid", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_PATIENCE_S", 0.0)


def spec(folder: Path, **changes: object) -> JobSpec:
    job = JobSpec(str(folder), "x", [["train", "no such recipe"]], str(folder), num_nodes=2, is_run=True)
    return JobSpec.from_dict(job.to_dict() | changes)


def test_the_name_of_the_first_node(tmp_path: Path) -> None:
    identity = RankIdentity.here(spec(tmp_path), NODES | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"})
    forwarding = SignalForwarder.__new__(SignalForwarder)  # without its handlers: this process is the tests'
    forwarding.first = forwarding.send = None
    ending = _Rank(spec(tmp_path), identity, forwarding, None, None).run()
    assert ending.returncode == 1
    assert ending.last_line.startswith("the first node, nowhere-1.invalid, cannot be found by its name")
    assert "no such recipe" not in Path(ending.log).read_text()


def test_torchrun_is_not_started_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "job.json", spec(tmp_path, ranks_by="torchrun"))
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        SlurmTask(str(tmp_path))()
    assert "error: the first node, nowhere-1.invalid, cannot be found by its name" in str(caught.value)
