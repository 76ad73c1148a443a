"""Lists as SLURM writes them: tasks of an array, and hosts."""

from __future__ import annotations

import pytest

from launch.scheduler.slurm import SlurmError, hosts_of, tasks_of


@pytest.mark.parametrize(
    ("written", "indices"),
    [
        ("12_[0-3]", [0, 1, 2, 3]),
        ("12_[0-6:2]", [0, 2, 4, 6]),
        ("12_[7]", [7]),
        ("12_[0-198:2%40]", list(range(0, 199, 2))),
        ("12_[1,3-5,10-16:3%2]", [1, 3, 4, 5, 10, 13, 16]),
    ],
)
def test_the_waiting_tasks_of_an_array(written: str, indices: list[int]) -> None:
    assert tasks_of(written) == [f"12_{index}" for index in indices]


@pytest.mark.parametrize("job_id", ["12", "12_3", "12+1"])
def test_any_other_job_is_its_own_task(job_id: str) -> None:
    assert tasks_of(job_id) == [job_id]


def test_hosts() -> None:
    assert hosts_of("") == []
    assert hosts_of("n[1-2,07],gpu3,r[1-2]n[0,3]") == ["n1", "n2", "n07", "gpu3", "r1n0", "r1n3", "r2n0", "r2n3"]


@pytest.mark.parametrize("nodelist", ["bgp[000x133]", "n[1-2", "n[a-c]", "n[]", "n1,,n2"])
def test_what_is_no_list_of_hosts_is_named(nodelist: str) -> None:
    """As `scontrol show hostnames` refuses it, too."""
    with pytest.raises(SlurmError) as refused:
        hosts_of(nodelist)
    assert str(refused.value).startswith(f"{nodelist}: no list of hosts")
