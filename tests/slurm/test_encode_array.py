"""An encode as an array of jobs on a real SLURM: one task is killed, one preempted, and nothing is missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from launch.record.job import JobStart, read_starts, read_submissions
from pomscale.shards.schema import MANIFEST_NAME, read_manifest
from support.cluster import CPUS_PER_NODE, SlurmCluster
from support.launched import pomscale
from support.running import wait_until

WITH_AND_WITHOUT_ACCOUNTING = True
pytestmark = pytest.mark.slow

NUM_TASKS, NUM_PICTURES = 6, 1500
RECIPE = """
kind: encode
name: pictures
output: {folder}/latents
source: {{kind: image_folder, path: {folder}/pictures}}
codec: {{name: pixel, block: 2, channels: 3}}
transform: {{size: 16}}
shard_samples: 25
batch: 25
num_workers: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Large pictures, so that six tasks on two cores have work for some ten seconds. All are the same file."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg", quality=50)
    for label in range(3):
        folder = tmp_path / "pictures" / f"class-{label}"
        folder.mkdir(parents=True)
        for number in range(NUM_PICTURES // 3):
            os.link(tmp_path / "noise.jpg", folder / f"{number:04d}.jpg")
    path = tmp_path / "encode.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def encoder(cluster: SlurmCluster, job_id: str, task: int) -> psutil.Process | None:
    """The process that encodes, of one task of the array; its guard has the same environment."""
    wanted = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "SLURM_ARRAY_JOB_ID": job_id}
    wanted["SLURM_ARRAY_TASK_ID"] = str(task)
    for process in psutil.process_iter():
        try:
            if "encode" in process.cmdline() and wanted.items() <= process.environ().items():
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def wait_for_parts(latents: Path, count: int, told: Path) -> None:
    deadline_s = time.monotonic() + 240
    while len(list((latents / "parts").glob("part-*.json"))) < count:
        logs = "\n".join(path.read_text()[-2000:] for path in told.glob("logs/*.log"))
        assert time.monotonic() < deadline_s, f"not {count} parts in time\n{logs}"
        time.sleep(0.05)


def test_tasks_that_are_killed_and_preempted_leave_no_gap(slurm: SlurmCluster, tmp_path: Path, recipe: Path) -> None:
    latents, job_folder = tmp_path / "latents", tmp_path / "pipelines" / "all" / "encode"
    stages = [
        {"name": "encode", "recipe": str(recipe), "array": NUM_TASKS},
        {"name": "finish", "recipe": str(recipe)},
        {"name": "verify", "run": [f"data verify {latents}"]},
    ]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"kind": "pipeline", "name": "all", "stages": stages}))
    # Six tasks of four cores fill the three nodes.
    profile = slurm.profile(tmp_path)
    pomscale(slurm, "launch", str(path), "--cluster", str(profile), f"output={tmp_path}/pipelines")
    (submission,) = read_submissions(job_folder)
    assert submission.num_tasks == NUM_TASKS

    wait_for_parts(latents, 2, job_folder)
    wait_until(lambda: len(read_starts(job_folder)) >= NUM_TASKS, "not all tasks have begun", timeout_s=120)
    hosts = {start.record.job_id.rpartition("_")[2]: start.record.hosts[0] for start in read_starts(job_folder)}
    elsewhere = min(set(hosts.values()) - {hosts["3"]})
    deadline_s = time.monotonic() + 240
    while (victim := encoder(slurm, submission.job_id, 3)) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    victim.kill()
    # All of a node, or it could have the place that the victim leaves.
    whole = [f"--nodelist={elsewhere}", "--ntasks=1", f"--cpus-per-task={CPUS_PER_NODE}"]
    other = slurm.submit("sleep 2", "--partition=high", *whole, cwd=tmp_path)
    last = read_submissions(job_folder.with_name("verify"))[-1].job_id
    state = slurm.wait_for(last, "COMPLETED", "FAILED", "CANCELLED", timeout_s=600)
    assert state == "COMPLETED", "\n".join(log.read_text()[-3000:] for log in job_folder.parent.glob("*/logs/*.log"))
    slurm.wait_for(other, "COMPLETED")

    starts: dict[str, list[JobStart]] = {}
    for start in read_starts(job_folder):
        starts.setdefault(start.record.job_id, []).append(start)
    assert sorted(starts) == [f"{submission.job_id}_{task}" for task in range(NUM_TASKS)]
    ends = {task: [one.verdict.action for one in found if one.verdict] for task, found in starts.items()}
    assert all(actions[-1] == "done" for actions in ends.values()), ends
    killed = starts[f"{submission.job_id}_3"][0].verdict
    assert killed is not None
    assert "killed by SIGKILL" in killed.reason
    preempted = [found for task, found in starts.items() if len(found) > 1 and not task.endswith("_3")]
    assert preempted, ends
    for found in preempted:
        assert found[0].record.hosts == [elsewhere]
        assert found[0].verdict is not None
        assert found[0].verdict.action == "requeue"

    manifest = read_manifest(latents)
    assert (manifest.num_samples, manifest.num_failures) == (NUM_PICTURES, 0)
    (log,) = job_folder.with_name("finish").glob("logs/*.log")
    assert f"0 of {NUM_PICTURES // 25} parts made, {NUM_PICTURES // 25} were there" in log.read_text()
    assert f"{NUM_PICTURES:,} samples in {NUM_PICTURES // 25} shards" in log.read_text()
    made_unix_s = (latents / MANIFEST_NAME).stat().st_mtime
    verified = read_starts(job_folder.with_name("verify"))[0].record
    assert made_unix_s < verified.started_unix_s
