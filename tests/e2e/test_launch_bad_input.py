"""A launch that cannot work: one clear error, before anything is written or submitted. What sbatch itself refuses is in
tests/slurm/test_launch.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from support.running import GLOBAL_BATCH, Finished, pomscale, run, train

PROFILE = """\
kind: cluster
scheduler: slurm
gpus_per_node: 0
ranks_per_node: 2
cpus_per_node: 2
time_limit: 1:00:00
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(PROFILE)
    return path


def refused(recipe: Path, cluster: Path | str, *words: str, expect: int = 2) -> str:
    """The one error. Nothing has changed on disk."""
    before = files(recipe.parent)
    done: Finished = pomscale("launch", recipe, "--cluster", cluster, *words, expect=expect)
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert files(recipe.parent) == before
    return done.stderr.strip().removeprefix("error: ")


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


def test_a_profile_that_lacks_a_field(tiny_recipe: Path, cluster: Path) -> None:
    cluster.write_text(PROFILE.replace("cpus_per_node: 2\n", "").replace("gpus", "gpu"))
    told = refused(tiny_recipe, cluster)
    assert f"{cluster}:1: cpus_per_node: missing; set it here or in a base file" in told
    assert f"{cluster}:3: gpu_per_node: unknown key; did you mean 'gpus_per_node'?" in told


def test_a_profile_that_nobody_knows(tiny_recipe: Path) -> None:
    told = refused(tiny_recipe, "jean-zay")
    assert "there is no such profile; did you mean 'jean-zay-" in told
    assert "known are a100, debug, h100" in told


def test_a_dataset_that_is_missing(tiny_recipe: Path, cluster: Path) -> None:
    told = refused(tiny_recipe, cluster, "data.path=nowhere")
    assert told == "dataset nowhere: there is no such folder; make it with `pomscale data encode RECIPE`"


def test_nodes_that_do_not_divide_the_mesh(tiny_recipe: Path, cluster: Path) -> None:
    told = refused(tiny_recipe, cluster, "--nodes", "3", "fsdp2.shard_size=4")
    assert told.startswith("fsdp2.shard_size: 6 ranks do not make whole copies of 4; use a multiple of 4 ranks")


def test_a_run_folder_of_another_recipe(tiny_recipe: Path, cluster: Path) -> None:
    train(tiny_recipe, f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}")
    folder = tiny_recipe.parent / "runs" / "tiny"
    told = refused(tiny_recipe, cluster, "seed=1")
    assert told == (f"{folder}: this run began with another recipe; choose another name, or undo: seed: 0 then, 1 now")
    finished = refused(tiny_recipe, cluster, f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}")
    assert finished.startswith(f"{folder}: finished already, 320 samples")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs: apt-get install slurm-client")
def test_a_slurm_that_does_not_answer(
    tiny_recipe: Path, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "slurm.conf"
    configuration.write_text("ClusterName=gone\nSlurmctldHost=localhost\nSlurmctldPort=1\nAuthType=auth/none\n")
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", str(cluster)]
    done = run(["env", f"SLURM_CONF={configuration}", *words], expect=1)
    assert done.stderr.startswith("error: scontrol ping: ")
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_slurm(tiny_recipe: Path, cluster: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pomscale", "launch", str(tiny_recipe), "--cluster", str(cluster)]
    done = run(["/usr/bin/env", f"PATH={tmp_path}", *words], expect=1)
    assert done.stderr.startswith("error: scontrol: no such command here; is this a machine of a SLURM cluster?")
    assert not (tmp_path / "runs").exists()
    shown = run(["/usr/bin/env", f"PATH={tmp_path}", *words, "--dry-run"])
    assert "SLURM     not on this machine, so the job script was not tested\n" in shown.stdout
    assert "#SBATCH --ntasks-per-node=2\n" in shown.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--array", "3"], "--array: only an encode is shared by tasks; a training run spans --nodes"),
        (["--time", "20:00"], "--time 20:00: give HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES"),
        (["--set", "gpus=3"], "override 'gpus=3': gpus: unknown key; did you mean 'gpu'?"),
        (["--set", "scheduler=local", "--set", "time_limit=null", "--time", "1:00:00"], "--time: a local job has no"),
        (
            ["--set", "scheduler=local", "--set", "time_limit=null", "--set", "python=/nowhere/python"],
            "python: /nowhere/python is no program on this machine",
        ),
        (
            ["--set", "scheduler=local", "--set", "time_limit=null", "--nodes", "2"],
            "--nodes 2: a local job has one node",
        ),
        (["lr=1"], "override 'lr=1': lr: unknown key; did you mean 'optimizer.lr'?"),
    ],
)
def test_options_that_do_not_go_together(tiny_recipe: Path, cluster: Path, words: list[str], expected: str) -> None:
    assert refused(tiny_recipe, cluster, *words).startswith(expected)


def test_options_of_a_stage_are_not_for_a_pipeline(tmp_path: Path, cluster: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("kind: pipeline\nname: p\nstages:\n- {name: check, run: [data verfy x]}\n")
    assert refused(path, cluster, "--nodes", "2").startswith("--nodes: every stage of a pipeline says this for itself")
    told = refused(path, cluster)
    assert told.startswith("stage check: `pomscale data verfy x` is no command: ")
    assert "invalid choice: 'verfy'" in told


def test_a_bad_point_of_a_sweep(tiny_recipe: Path, cluster: Path) -> None:
    with tiny_recipe.open("a") as file:
        file.write("sweep:\n  optimizer.lr: [1e-3, -1]\n  seed: [0, 1]\n")
    line = len(tiny_recipe.read_text().splitlines()) - 1
    told = refused(tiny_recipe, cluster)
    assert told == (f"{tiny_recipe}:{line}: optimizer.lr: input should be greater than 0, got -1 (sweep: lr=-1-seed=0)")
