"""The kernel's count of processes killed for want of memory, as both versions of control groups tell it."""

from __future__ import annotations

from pathlib import Path

from launch.node.oom import num_out_of_memory_kills


def test_version_2_counts_the_groups_below_too(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "slurm" / "job_7"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n")
    (tmp_path / "cgroup").write_text("0::/slurm/job_7\n")
    assert num_out_of_memory_kills(tmp_path / "cgroup", tmp_path / "fs") == 2


def test_version_1_has_a_hierarchy_for_memory(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "memory" / "slurm" / "job_7"
    group.mkdir(parents=True)
    (group / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n0::/\n")
    assert num_out_of_memory_kills(tmp_path / "cgroup", tmp_path / "fs") == 3


def test_without_control_groups_nobody_was_killed_for_memory(tmp_path: Path) -> None:
    assert num_out_of_memory_kills(tmp_path / "missing", tmp_path) == 0
    assert isinstance(num_out_of_memory_kills(), int)  # this machine's own
