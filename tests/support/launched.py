"""A tiny run that `pomscale launch` has submitted to the test cluster, and what a test does to it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.record.job import JobStart, read_starts
from pomscale.runs.history import samples_seen
from support import running
from support.cluster import SlurmCluster
from support.running import GLOBAL_BATCH, losses, write_tiny_recipe

NUM_STEPS = 45
OVERRIDES = [
    f"training.total_samples={NUM_STEPS * GLOBAL_BATCH}",
    "schedule={}",
    "optimizer.lr=3e-4",
    "model.depth=1",
    "faults.preflight=false",
    "monitoring.wandb.mode=offline",
]
HELD_AT = 40 * GLOBAL_BATCH  # beyond where tests meet the run, before its end


@dataclass(frozen=True)
class Launched:
    cluster: SlurmCluster
    job_id: str
    folder: Path

    def wait_for_samples(self, samples: int, timeout_s: float = 180) -> None:
        deadline_s = time.monotonic() + timeout_s
        while samples_seen(self.folder) < samples:
            assert time.monotonic() < deadline_s, f"not at {samples} samples in time\n{self.told()}"
            time.sleep(0.02)

    def wait_for_start(self, number: int, timeout_s: float = 180) -> None:
        """Wait until the run was started that many times."""
        deadline_s = time.monotonic() + timeout_s
        while len(read_starts(self.folder)) < number:
            assert time.monotonic() < deadline_s, f"not started {number} times in time\n{self.told()}"
            time.sleep(0.1)

    def finish(self, *states: str, timeout_s: float = 240) -> list[JobStart]:
        """Wait for the end of the job in one of these states (COMPLETED). Return its starts."""
        states = states or ("COMPLETED",)
        state = self.cluster.wait_for(self.job_id, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", timeout_s=timeout_s)
        assert state in states, f"{state}\n{self.told()}"
        return read_starts(self.folder)

    def rank(self, rank: int, job_id: str | None = None) -> psutil.Process:
        """The training process of a rank."""
        for process in self.cluster.processes_of(job_id or self.job_id):
            try:
                if process.environ().get("RANK") == str(rank) and "train" in process.cmdline():
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no process of rank {rank}\n{self.told()}")

    def told(self) -> str:
        """Return everything that the run and its guards have printed, for a test that fails."""
        files = [path for kind in ("logs/*.log", "submitit/*.out", "submitit/*.err") for path in self.folder.glob(kind)]
        told = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(files)]
        told += [f"--- {path}\n{path.read_text()}" for path in sorted(self.folder.glob("attempts/*/*.json"))]
        return "\n".join(told)


def launch(
    cluster: SlurmCluster,
    folder: Path,
    digits: Path,
    *overrides: str,
    num_nodes: int = 2,
    options: tuple[str, ...] = (),
) -> Launched:
    """One rank per node; folder/test.yaml is the profile, if the test has made one. options: of the command."""
    recipe = write_tiny_recipe(folder, digits)
    profile = folder / "test.yaml"
    if not profile.exists():
        cluster.profile(folder, ranks_per_node=1)
    words = ["launch", str(recipe), "--cluster", str(profile), "--nodes", str(num_nodes), *options]
    out = pomscale(cluster, *words, *OVERRIDES, *overrides)
    job_folder = folder / "runs" / "tiny"
    job_id = json.loads((job_folder / "jobs.jsonl").read_text().splitlines()[-1])["job_id"]
    assert job_id in out
    return Launched(cluster, job_id, job_folder)


def hold(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, file: Path, samples: int = HELD_AT) -> Path:
    """Runs that are submitted from now on go no further while the file is there, unless asked to stop.

    However late a test comes, it meets them before their end. See tests/support/unhurried.
    """
    file.write_text(str(samples))
    monkeypatch.setitem(cluster.environment, "UNHURRIED_HELD", str(file))
    return file


def pomscale(cluster: SlurmCluster, *words: str, expect: int = 0) -> str:
    done = running.pomscale(*words, expect=expect, env=cluster.environment)
    return done.stdout + done.stderr


def assert_every_sample_once(folder: Path, reference: dict[int, float]) -> None:
    """The curve of the undisturbed run, step by step; and each start begins where the one before it has saved."""
    found = losses(folder)
    assert list(found) == list(reference) == [GLOBAL_BATCH * step for step in range(1, NUM_STEPS + 1)]
    for samples, loss in found.items():
        assert abs(loss - reference[samples]) <= 1e-3 * abs(reference[samples]), f"at {samples} samples"


def wandb_ids(folder: Path) -> set[str]:
    """Return the ids of the wandb runs of all starts, from the names of the offline folders."""
    return {path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}


def excluded(cluster: SlurmCluster, job_id: str) -> str:
    shown = cluster.run(["scontrol", "show", "job", job_id])
    return next(word.partition("=")[2] for word in shown.split() if word.startswith("ExcNodeList="))


def incarnations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incarnations.jsonl").read_text().splitlines()]
