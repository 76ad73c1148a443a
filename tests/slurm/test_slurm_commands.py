"""launch.scheduler.slurm on a real SLURM, with and without accounting."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.scheduler import slurm as commands
from launch.scheduler.slurm import SlurmError
from support.cluster import SlurmCluster, processes_in
from support.paths import ROOT
from support.running import wait_until

SLEEP = "srun --overlap sleep 600"

FROM_INSIDE = """
import signal, sys
from launch.scheduler import slurm
signal.signal(signal.SIGTERM, signal.SIG_IGN)
restart, job_id, host = sys.argv[1:]
if restart == "0":
    slurm.requeue(job_id)
    slurm.exclude(job_id, [host])
    states = [slurm.state_now(job_id) for _ in range(50)]
    print(sorted(set(states)), slurm.job_states([job_id])[job_id].num_restarts, flush=True)
"""


def test_states_of_jobs_that_run_wait_and_have_failed(slurm: SlurmCluster) -> None:
    failed = slurm.submit("exit 3")
    slurm.wait_for(failed, "FAILED")
    running = slurm.submit(SLEEP, "--nodes=2", "--time=1:00:00")
    waiting = slurm.submit(SLEEP, "--hold")
    slurm.wait_for(running, "RUNNING")
    states = commands.job_states([failed, running, waiting, "4242"])
    assert list(states.keys() - {failed, running, waiting}) == []
    assert (states[failed].state, states[failed].reason) == ("FAILED", "NonZeroExitCode")
    assert (states[running].state, states[running].reason) == ("RUNNING", "")
    assert states[running].hosts == slurm.nodes[:2]
    assert 0 <= states[running].elapsed_s < 300
    assert states[running].num_restarts == 0
    assert (states[waiting].state, states[waiting].reason) == ("PENDING", "JobHeldUser")
    assert states[waiting].hosts == []
    assert [commands.state_now(job) for job in (failed, running, waiting)] == ["FAILED", "RUNNING", "PENDING"]


@pytest.mark.parametrize("asked", [["4242"], ["4242", "4243"], []])
def test_unknown_jobs_are_absent(slurm: SlurmCluster, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.job_states(asked) == {}
    assert commands.state_now("4242") == ""
    assert capsys.readouterr().err == ""  # that there is no accounting is no news


def test_tasks_of_an_array_come_one_by_one(slurm: SlurmCluster, tmp_path: Path) -> None:
    array = slurm.submit("echo $SLURM_JOB_ID; sleep 600", "--array=0-3%2", "--output=%a", cwd=tmp_path)
    for task in ("_0", "_1"):
        slurm.wait_for(array + task, "RUNNING")
    states = commands.job_states([array])
    assert {job_id: state.state for job_id, state in states.items()} == {
        f"{array}_0": "RUNNING",
        f"{array}_1": "RUNNING",
        f"{array}_2": "PENDING",
        f"{array}_3": "PENDING",
    }
    assert list(commands.job_states([f"{array}_1"])) == [f"{array}_1"]
    assert [commands.has_not_begun(job) for job in (array, f"{array}_1", f"{array}_3")] == [False, False, True]
    # A task knows itself by a number of its own.
    wait_until(lambda: (tmp_path / "0").is_file() and (tmp_path / "0").read_text() != "", timeout_s=120)
    number = (tmp_path / "0").read_text().strip()
    assert number != array
    assert commands.job_states([number])[number].hosts == states[f"{array}_0"].hosts
    assert commands.state_now(number) == "RUNNING"


def test_no_task_of_a_list_with_a_step_is_left_out(slurm: SlurmCluster) -> None:
    """As `squeue --array` does; and the widest list is not cut off."""
    with_step = slurm.submit(SLEEP, "--hold", "--array=0-198:2")
    leftover, irregular = (slurm.submit(SLEEP, "--hold", "--array=0-199%7") for _ in range(2))
    gone = [index for index in range(200) if index * index % 7 in (1, 2)]
    slurm.run(["scancel", *(f"{leftover}_{index}" for index in range(1, 200, 2))])
    slurm.run(["scancel", *(f"{irregular}_{index}" for index in gone)])
    states = commands.job_states([with_step, leftover, irregular])
    waiting = {job_id for job_id, state in states.items() if state.state == "PENDING"}
    assert waiting == {
        *(f"{array}_{index}" for array in (with_step, leftover) for index in range(0, 200, 2)),
        *(f"{irregular}_{index}" for index in range(200) if index not in gone),
    }


def test_what_squeue_forgot_accounting_remembers(slurm_accounted: SlurmCluster) -> None:
    failed, array = _forgotten_jobs(slurm_accounted)
    states = commands.job_states([failed, array, "4242"])
    assert {job_id: state.state for job_id, state in states.items()} == {
        failed: "FAILED",
        f"{array}_0": "COMPLETED",
        f"{array}_1": "COMPLETED",
    }
    assert states[failed].hosts == slurm_accounted.nodes[:1]
    assert states[failed].num_restarts is None
    assert commands.state_now(failed) == ""


def test_without_accounting_what_squeue_forgot_is_unknown(
    slurm: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    _, array = _forgotten_jobs(slurm)
    running = slurm.submit(SLEEP)
    slurm.wait_for(running, "RUNNING")
    assert list(commands.job_states([str(int(array) + 100), running])) == [running]
    assert capsys.readouterr().err == ""


def test_accounting_that_is_away_is_told_and_what_squeue_knows_is_known(
    slurm_accounted: SlurmCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = slurm_accounted.submit(SLEEP)
    slurm_accounted.wait_for(running, "RUNNING")
    _use_configuration(slurm_accounted, tmp_path, monkeypatch, "AccountingStoragePort=1")
    assert list(commands.job_states([running, "4242"])) == [running]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "sacct" in told
    assert "unknown" in told


def test_requeue_and_exclude_from_inside_a_job_that_slurm_is_ending(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "inside.py").write_text(FROM_INSIDE)
    host = slurm.nodes[1]
    inside = f"{sys.executable} inside.py ${{SLURM_RESTART_COUNT:-0}} $SLURM_JOB_ID {host}"
    script = f"trap '' TERM; echo $SLURM_JOB_NODELIST; srun --nodes=1 --ntasks=1 {inside}"
    job = slurm.submit(
        script, "--nodes=2", "--requeue", "--open-mode=append", f"--export=ALL,PYTHONPATH={ROOT}", cwd=tmp_path
    )
    slurm.wait_for(job, "COMPLETED")
    lines = [line for line in (tmp_path / f"slurm-{job}.out").read_text().splitlines() if line[0] in "1["]
    assert lines == ["127.0.0.[1-2]", "['COMPLETING'] 1", "127.0.0.[1,3]"]
    assert commands.job_states([job])[job].num_restarts == 1


def test_what_slurm_sends_to_a_job_does_not_hit_a_question(slurm: SlurmCluster) -> None:
    job = slurm.submit(SLEEP)
    slurm.wait_for(job, "RUNNING")
    (controller,) = (process for process in processes_in(slurm.folder) if process.name() == "slurmctld")
    with ThreadPoolExecutor(1) as thread:
        controller.suspend()
        try:
            answer = thread.submit(commands.state_now, job)
            wait_until(lambda: "squeue" in [child.name() for child in psutil.Process().children()], timeout_s=120)
            (question,) = (child for child in psutil.Process().children() if child.name() == "squeue")
            for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                question.send_signal(number)
        finally:
            controller.resume()
        assert answer.result(timeout=120) == "RUNNING"


def test_excluded_hosts_add_up_and_a_running_job_has_its_hosts(slurm: SlurmCluster) -> None:
    waiting = slurm.submit(SLEEP, "--hold", f"--exclude={slurm.nodes[0]}")
    commands.exclude(waiting, [slurm.nodes[1]])
    commands.exclude(waiting, [slurm.nodes[1]])
    slurm.run(["scontrol", "release", waiting])
    slurm.wait_for(waiting, "RUNNING")
    assert commands.job_states([waiting])[waiting].hosts == slurm.nodes[2:]
    with pytest.raises(SlurmError, match=r"scontrol update .*ExcNodeList=.*no longer pending"):
        commands.exclude(waiting, [slurm.nodes[2]])
    with pytest.raises(SlurmError, match="Invalid node name"):
        commands.exclude(slurm.submit(SLEEP, "--hold"), ["nowhere"])


def test_cancel_ends_a_job_and_requeue_brings_it_back(slurm: SlurmCluster) -> None:
    job = slurm.submit(SLEEP)
    slurm.wait_for(job, "RUNNING")
    commands.cancel(job)
    slurm.wait_for(job, "CANCELLED")
    commands.cancel(job)
    commands.cancel("4242")
    commands.requeue(job)
    slurm.wait_for(job, "PENDING", "RUNNING")
    with pytest.raises(SlurmError, match=r"^scontrol requeue 4242: Invalid job id"):
        commands.requeue("4242")


def test_a_signal_reaches_every_task_and_no_job_that_does_not_run(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "task").write_text(
        "trap 'echo $SLURM_PROCID got it; exit' USR2; touch $SLURM_PROCID; while true; do sleep 0.1; done"
    )
    job = slurm.submit("srun bash task", "--nodes=2", cwd=tmp_path)
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"), timeout_s=120)
    commands.send_signal(job, "USR2")
    slurm.wait_for(job, "COMPLETED")
    told = (tmp_path / f"slurm-{job}.out").read_text()
    assert "0 got it" in told
    assert "1 got it" in told
    waiting = slurm.submit(SLEEP, "--hold")
    for absent, state in ((job, "COMPLETED"), (waiting, "PENDING"), ("4242", "unknown to squeue")):
        with pytest.raises(SlurmError, match=f"job {absent} is {state}"):
            commands.send_signal(absent, "USR2")


def test_bad_nodes_are_those_that_are_down_or_drained(slurm: SlurmCluster) -> None:
    assert commands.bad_nodes(slurm.nodes) == []
    slurm.set_node(slurm.nodes[2], "DRAIN")
    slurm.set_node(slurm.nodes[0], "DOWN")
    assert commands.bad_nodes(slurm.nodes[:2]) == slurm.nodes[:1]
    assert commands.bad_nodes([slurm.nodes[2], "nowhere", slurm.nodes[0]]) == [slurm.nodes[2], slurm.nodes[0]]
    assert commands.bad_nodes([]) == []


def test_a_controller_that_is_away_is_an_error_in_slurms_own_words(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.check_answers()
    slurm.kill_controller()
    start_s = time.monotonic()
    with pytest.raises(SlurmError, match=r"scontrol ping: Slurmctld\(primary\) at .* is DOWN\. .* --cluster local"):
        commands.check_answers()
    assert time.monotonic() - start_s < 30, "squeue would have tried for longer than MessageTimeout"
    _use_configuration(slurm, tmp_path, monkeypatch, "MessageTimeout=1")
    with pytest.raises(SlurmError, match=r"^squeue .*: slurm_load_jobs error: Unable to contact slurm controller"):
        commands.job_states(["1"])


def test_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not commands.is_available()
    with pytest.raises(SlurmError, match="no such command here"):
        commands.check_answers()
    with pytest.raises(SlurmError, match="squeue: no such command here"):
        commands.job_states(["1"])


def test_a_users_own_defaults_change_nothing(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slurm.submit("exit 3")
    slurm.wait_for(job, "FAILED")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_PARTITION", "high")
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    monkeypatch.setenv("SQUEUE_FORMAT2", "name")
    assert commands.job_states([job])[job].state == "FAILED"
    assert commands.state_now(job) == "FAILED"


_PARTS = st.one_of(
    st.from_regex(r"[a-z]{1,3}[0-9]{0,2}", fullmatch=True),
    st.from_regex(r"[a-z]{1,2}\[[0-9]{2}(,[0-9]{2})?\]", fullmatch=True),
    st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda pair: f"n[{pair[0]}-{sum(pair)}]"),
    st.tuples(st.integers(8, 11), st.integers(0, 3)).map(lambda pair: f"n[{pair[0]:03d}-{sum(pair):03d},200]"),
    st.tuples(st.integers(1, 2), st.integers(1, 3)).map(lambda pair: f"r[1-{pair[0]}]n[0-{pair[1]}]"),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_PARTS, min_size=1, max_size=4).map(",".join))
def test_lists_of_hosts_are_read_as_slurm_reads_them(slurm: SlurmCluster, nodelist: str) -> None:
    theirs = slurm.run(["scontrol", "show", "hostnames", nodelist]).split()
    assert commands.hosts_of(nodelist) == theirs


def test_commands_import_no_torch() -> None:
    program = (
        "import sys, launch.scheduler.slurm; sys.exit(sorted({'torch', 'numpy', 'wandb'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


def _use_configuration(cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """For the commands of this process: the cluster's own, with one line changed."""
    name = line.partition("=")[0] + "="
    lines = [old for old in cluster.config.read_text().splitlines() if not old.startswith(name)]
    (folder / "slurm.conf").write_text("\n".join([*lines, line, ""]))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))


def _forgotten_jobs(cluster: SlurmCluster) -> tuple[str, str]:
    """A job that failed and an array of two that went well, which the controller has forgotten."""
    failed = cluster.submit("exit 3")
    array = cluster.submit("true", "--array=0-1")
    cluster.wait_for(failed, "FAILED")
    for task in ("_0", "_1"):
        cluster.wait_for(array + task, "COMPLETED")
    if cluster.accounting:  # it is told a little later
        words = ["sacct", "-n", "-X", "-P", "-o", "state", "-j", f"{failed},{array}"]
        wait_until(lambda: sorted(cluster.run(words).split()) == ["COMPLETED", "COMPLETED", "FAILED"], timeout_s=120)
    cluster.kill_controller()
    cluster.start_controller(forget_jobs=True)
    return failed, array
