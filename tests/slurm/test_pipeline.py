"""Pipelines on a real SLURM: dependent jobs from raw pictures to a judged model, and what a failure does to them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from launch.record.job import read_starts, read_submissions
from launch.record.pipeline import read_pipeline
from launch.record.result import final_verdict
from pomscale.runs.history import samples_seen
from support.cluster import SlurmCluster
from support.launched import hold, pomscale
from support.paths import RECIPES
from support.running import GLOBAL_BATCH, damaged_copy, outcome, write_tiny_recipe

WITH_AND_WITHOUT_ACCOUNTING = True
pytestmark = pytest.mark.slow

SMALL = ["model.dim=32", "model.depth=2", "training.total_samples=1280", "schedule={}", "sampling.every_samples=null"]


def write(folder: Path, stages: list[dict[str, object]]) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"kind": "pipeline", "name": "all", "stages": stages}, sort_keys=False))
    return path


def jobs_of(pipeline: Path) -> dict[str, str]:
    """Stage -> job."""
    return {stage.name: read_submissions(Path(stage.job_folder))[-1].job_id for stage in read_pipeline(pipeline).stages}


def told(pipeline: Path) -> str:
    """What the stages have printed, for a test that fails."""
    logs = [path for stage in read_pipeline(pipeline).stages for path in Path(stage.job_folder).glob("logs/*.log")]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)


def state_of(cluster: SlurmCluster, job_id: str, timeout_s: float = 600) -> str:
    """The one in which it ends."""
    return cluster.wait_for(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=timeout_s)


def in_the_queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run(["squeue", "-h", "-o", "%i"]).split()


def test_the_digits_from_pictures_to_a_verdict(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe that is shipped, with a smaller model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits / "digits")
    stages = yaml.safe_load((RECIPES / "pipelines" / "digits.yaml").read_text())["stages"]
    for stage in stages:
        if "recipe" in stage:
            stage["recipe"] = str(RECIPES / "pipelines" / stage["recipe"])
        if stage["name"] == "train":
            stage["overrides"] += SMALL
    path, pipeline = write(tmp_path, stages), tmp_path / "pipelines" / "all"
    said = pomscale(slurm, "launch", str(path), "--cluster", str(slurm.profile(tmp_path)))
    jobs = jobs_of(pipeline)
    assert all(job_id in said for job_id in jobs.values())
    assert state_of(slurm, jobs["evaluate"]) == "COMPLETED", told(pipeline)
    starts = {
        stage.name: [(start.record.started_unix_s, start.verdict) for start in read_starts(Path(stage.job_folder))]
        for stage in read_pipeline(pipeline).stages
    }
    assert {name: len(found) for name, found in starts.items()} == {name: 1 for name in jobs} | {"encode": 2}
    for stage in read_pipeline(pipeline).stages:
        for before in stage.after:
            ends = [verdict.decided_unix_s for _, verdict in starts[before] if verdict is not None]
            assert max(ends) <= min(begun for begun, _ in starts[stage.name]), f"{stage.name} before {before} had ended"
    assert outcome(tmp_path / "runs" / "digits")["state"] == "finished"
    found = json.loads((pipeline / "evaluate" / "digits.json").read_text())
    assert found["num_generated"] == 200
    assert 0 <= found["accuracy_generated"] <= 1
    assert found["accuracy_real"] > 0.95

    again = pomscale(slurm, "launch", str(path), "--cluster", str(tmp_path / "test.yaml"))
    assert "nothing to submit" in again
    assert jobs_of(pipeline) == jobs


def test_cancelling_the_middle_stops_the_rest_and_launching_again_goes_on(
    slurm: SlurmCluster, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(slurm, monkeypatch, tmp_path / "held")
    recipe = write_tiny_recipe(tmp_path, digits)
    overrides = [f"training.total_samples={120 * GLOBAL_BATCH}", "schedule={}", "faults.preflight=false"]
    stages: list[dict[str, object]] = [
        {"name": "check", "run": [f"config validate {recipe}"]},
        {"name": "train", "recipe": str(recipe), "overrides": overrides},
        {"name": "sample", "run": ["sample {train} --num-samples 1 --classes 0 --out {sample}/grid.png"]},
        {"name": "show", "run": [f"config show {recipe}"]},
        {"name": "report", "run": [f"config show {recipe}"], "after": {"train": "any"}},
    ]
    path = write(tmp_path, stages)
    command = ["launch", str(path), "--cluster", str(slurm.profile(tmp_path)), f"output={tmp_path}/pipelines"]
    pomscale(slurm, *command)
    pipeline, run = tmp_path / "pipelines" / "all", tmp_path / "runs" / "tiny"
    first = jobs_of(pipeline)
    deadline_s = time.monotonic() + 240
    while samples_seen(run) < 20 * GLOBAL_BATCH:
        assert time.monotonic() < deadline_s, told(pipeline)
        time.sleep(0.05)
    slurm.run(["scancel", first["train"]])
    assert {name: state_of(slurm, job_id) for name, job_id in first.items()} == {
        "check": "COMPLETED",
        "train": "CANCELLED",
        "sample": "CANCELLED",
        "show": "CANCELLED",
        "report": "COMPLETED",
    }
    assert read_starts(pipeline / "sample") == read_starts(pipeline / "show") == []
    held.unlink()

    said = pomscale(slurm, *command)
    second = jobs_of(pipeline)
    assert [name for name in second if second[name] == first[name]] == ["check"], said
    assert "check   done" in said
    assert {state_of(slurm, job_id) for job_id in second.values()} == {"COMPLETED"}, told(pipeline)
    assert outcome(run)["state"] == "finished"
    assert (pipeline / "sample" / "grid.png").is_file()


def test_a_stage_that_fails_stops_the_rest(slurm: SlurmCluster, tmp_path: Path, digits: Path) -> None:
    damaged = damaged_copy(digits / "latents" / "train", tmp_path / "damaged")
    stages: list[dict[str, object]] = [
        {"name": "verify", "run": [f"data verify {damaged}"]},
        {"name": "then", "run": [f"data info {damaged}"]},
    ]
    command = ["launch", str(write(tmp_path, stages)), "--cluster", str(slurm.profile(tmp_path))]
    pomscale(slurm, *command, f"output={tmp_path}/pipelines")
    pipeline = tmp_path / "pipelines" / "all"
    jobs = jobs_of(pipeline)
    assert [state_of(slurm, jobs[name]) for name in ("verify", "then")] == ["FAILED", "CANCELLED"]
    verdict = final_verdict(pipeline / "verify")
    assert verdict is not None
    assert "problems" in verdict.reason
    assert read_starts(pipeline / "then") == []


def test_if_one_stage_is_refused_none_is_submitted(slurm: SlurmCluster, tmp_path: Path, tiny_recipe: Path) -> None:
    many = [f"training.total_samples={20_000 * GLOBAL_BATCH}", "schedule={}"]
    on_cpus = {"gpus_per_node": 0, "ranks_per_node": 1}
    stages: list[dict[str, object]] = [
        {"name": "train", "recipe": str(tiny_recipe), "overrides": many, **on_cpus},
        {"name": "sample", "run": ["sample {train} --num-samples 1 --out {sample}/grid.png"], **on_cpus},
        {"name": "huge", "run": [f"config show {tiny_recipe}"], "gpus_per_node": 8, "after": {}},
    ]
    # The profile promises more GPUs than a node of this cluster has.
    profile = slurm.profile(tmp_path, gpus_per_node=8, ranks_per_node=None, cpus_per_node=8)
    command = ["launch", str(write(tmp_path, stages)), "--cluster", str(profile)]
    said = pomscale(slurm, *command, f"output={tmp_path}/pipelines", expect=2)
    assert "stage huge" in said
    assert "not available" in said, "in sbatch's own words"
    assert "nothing is left in the queue: train, sample had been submitted, and were cancelled" in said
    assert in_the_queue(slurm) == []
