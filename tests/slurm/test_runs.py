"""`pomscale runs ...` on jobs of a real SLURM, with and without accounting, and while it is away."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.record.job import read_starts
from support.cluster import SlurmCluster
from support.launched import Launched, incarnations, launch, pomscale
from support.paths import RECIPES
from support.running import GLOBAL_BATCH, checkpoint_samples

pytestmark = pytest.mark.slow

ENDLESS = f"training.total_samples={100_000 * GLOBAL_BATCH}"
WITH_AND_WITHOUT_ACCOUNTING = True
MIDDLE = 10 * GLOBAL_BATCH


@pytest.fixture(autouse=True)
def slow_steps(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make the endless runs of this module leave the processor to others."""
    for name in {"slurm", "slurm_accounted"} & set(request.fixturenames):
        monkeypatch.setitem(request.getfixturevalue(name).environment, "UNHURRIED_S", "0.3")


def listed(cluster: SlurmCluster, folder: Path) -> dict[str, Any]:
    """The one run in a folder, as `pomscale runs --json` has it."""
    (run,) = json.loads(pomscale(cluster, "runs", str(folder), "--json"))
    return run


def wait_for_state(cluster: SlurmCluster, folder: Path, *states: str, timeout_s: float = 240) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while (run := listed(cluster, folder))["state"] not in states:
        assert time.monotonic() < deadline_s, f"{run['state']}: {run['reason']}"
        time.sleep(0.3)
    return run


def running(cluster: SlurmCluster, tmp_path: Path, digits: Path, num_nodes: int = 1) -> Launched:
    run = launch(cluster, tmp_path, digits, ENDLESS, num_nodes=num_nodes)
    run.wait_for_samples(MIDDLE)
    return run


def test_a_run_is_watched_requeued_cancelled_and_resumed(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    run = running(slurm, tmp_path, digits, num_nodes=2)
    job_folder = str(run.folder)
    shown = listed(slurm, run.folder)
    assert (shown["state"], shown["job_id"], shown["num_starts"]) == ("running", run.job_id, 1)
    assert 0 < shown["share"] < 1
    assert shown["eta_s"] > 0
    told = pomscale(slurm, "runs", "status", job_folder)
    assert f"{run.job_id}-0  {', '.join(slurm.nodes[:2])}" in told
    assert f"pomscale runs logs {job_folder} --follow" in told
    assert "2 ranks on" in pomscale(slurm, "watch", job_folder, "--once")
    assert "running already" in pomscale(slurm, "runs", "resume", job_folder, expect=2)

    for node in slurm.nodes:  # it is not to start again before that was seen
        slurm.set_node(node, "DRAIN")
    assert "asked to save and start again" in pomscale(slurm, "runs", "requeue", job_folder)
    waits = wait_for_state(slurm, run.folder, "requeued")
    assert "SIGUSR2" in waits["reason"]
    for node in slurm.nodes:
        slurm.set_node(node, "RESUME")
    run.wait_for_start(2)
    run.wait_for_samples(incarnations(run.folder)[0]["start_samples"] + 1)
    wait_for_state(slurm, run.folder, "running")
    assert listed(slurm, run.folder)["num_starts"] == 2
    everything = pomscale(slurm, "runs", "logs", job_folder, "--rank", "all", "--attempt", f"{run.job_id}-0")
    for rank in range(2):
        assert f"[rank {rank}] ===== start {run.job_id}-0 on {slurm.nodes[rank]}" in everything
    assert f"start {run.job_id}-1" not in everything

    assert "is requeued; saved: " in pomscale(slurm, "runs", "requeue", job_folder, "--now")
    run.wait_for_start(3)

    assert f"job {run.job_id}" in pomscale(slurm, "runs", "cancel", job_folder)
    cancelled = wait_for_state(slurm, run.folder, "cancelled")
    assert cancelled["job_id"] == run.job_id
    assert "not in the queue: cancelled" in pomscale(slurm, "runs", "cancel", job_folder, expect=1)
    assert "only a running job can be requeued" in pomscale(slurm, "runs", "requeue", job_folder, expect=2)

    saved = checkpoint_samples(run.folder)
    told = pomscale(slurm, "runs", "resume", job_folder, "--nodes", "1", "--time", "0:30:00")
    resumed = wait_for_state(slurm, run.folder, "running")
    assert f"job {resumed['job_id']}" in told
    assert resumed["job_id"] != run.job_id
    assert incarnations(run.folder)[-1]["start_samples"] == saved
    assert incarnations(run.folder)[-1]["num_ranks"] == 1
    assert len(read_starts(run.folder)[-1].record.hosts) == 1
    assert "TimeLimit=00:30:00" in slurm.run(["scontrol", "show", "job", resumed["job_id"]])


def test_a_run_that_waits_says_for_what(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    slurm.submit("sleep 600", "--partition=high", "--nodes=3", "--exclusive", cwd=tmp_path)
    run = launch(slurm, tmp_path, digits)
    waits = listed(slurm, run.folder)
    assert waits["state"] == "queued"
    assert waits["samples"] is None
    assert any(why in wait_for_reason(slurm, run.folder) for why in ("Resources", "Priority"))
    assert "queued" in pomscale(slurm, "runs", str(run.folder))
    assert "waits for it" in pomscale(slurm, "runs", "logs", str(run.folder), expect=2)
    assert "ended; nothing was saved yet" in pomscale(slurm, "runs", "cancel", str(run.folder))
    assert listed(slurm, run.folder)["state"] == "cancelled"


def wait_for_reason(cluster: SlurmCluster, folder: Path) -> str:
    """SLURM gives it when it has first tried to place the job."""
    deadline_s = time.monotonic() + 240
    while not (reason := str(listed(cluster, folder)["reason"])):
        assert time.monotonic() < deadline_s
        time.sleep(0.3)
    return reason


def test_slurm_is_away(slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running(slurm, tmp_path, digits)
    slurm.kill_controller()
    config = tmp_path / "slurm.conf"
    config.write_text(re.sub("(?m)^MessageTimeout=.*", "MessageTimeout=5", slurm.config.read_text()))
    try:
        with monkeypatch.context() as patch:  # for so long, and longer, SLURM's own commands try before they give up
            patch.setitem(slurm.environment, "SLURM_CONF", str(config))
            told = pomscale(slurm, "runs", str(run.folder))
            assert "warning: squeue" in told
            assert "the states are those in the run folders" in told
            assert " running " in told
            assert "is SLURM's, and squeue" in pomscale(slurm, "runs", "cancel", str(run.folder), expect=1)
    finally:
        for process in slurm.processes_of(run.job_id):  # the fixture waits for idle nodes
            with suppress(psutil.NoSuchProcess):
                process.kill()
        slurm.start_controller()


def test_what_squeue_has_forgotten(
    slurm: SlurmCluster, slurm_accounted: SlurmCluster, tmp_path: Path, digits: Path
) -> None:
    """Accounting remembers it; without, the folder tells what it can."""
    for cluster, states in ((slurm, ("stopped", "killed")), (slurm_accounted, ("cancelled",))):
        folder = tmp_path / ("accounted" if cluster.accounting else "plain")
        folder.mkdir()
        run = running(cluster, folder, digits)
        pomscale(cluster, "runs", "cancel", str(run.folder))
        wait_for_state(cluster, run.folder, "cancelled")
        cluster.kill_controller()
        cluster.start_controller(forget_jobs=True)
        assert listed(cluster, run.folder)["state"] in states


def test_an_array(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    profile = slurm.profile(tmp_path, scratch=str(tmp_path))
    job_folder = tmp_path / "runs" / "encode-digits"
    overrides = [f"source.path={digits}/digits/train", f"output={tmp_path}/latents"]
    words = [str(RECIPES / "data" / "digits.yaml"), "--cluster", str(profile), "--array", "3", *overrides]
    pomscale(slurm, "launch", *words)
    done = wait_for_state(slurm, job_folder, "finished")
    assert done["reason"] == ""
    told = pomscale(slurm, "runs", "status", str(job_folder))
    assert [f"{done['job_id']}_{task}-0" in told for task in range(3)] == [True] * 3
