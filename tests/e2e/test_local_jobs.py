"""`pomscale launch --cluster local`: the life cycle of a job on one machine, without SLURM, with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.record.job import JobSpec, JobStart, Verdict, read_starts
from launch.submission.job_script import SubmitOptions
from launch.submission.submit import submit
from pomscale.config.load import load_cluster
from pomscale.runs.history import samples_seen
from support.running import (
    GLOBAL_BATCH,
    checkpoint_samples,
    controller_of,
    damaged_copy,
    held_at,
    losses,
    outcome,
    pomscale,
    train,
    write_tiny_recipe,
)

pytestmark = pytest.mark.slow

NUM_STEPS = 60
TOTAL, MIDDLE = NUM_STEPS * GLOBAL_BATCH, 20 * GLOBAL_BATCH
OVERRIDES = [
    f"training.total_samples={TOTAL}",
    "schedule={}",
    "optimizer.lr=3e-4",
    "model.depth=1",
    "faults.preflight=false",
]
TIMEOUT_S = 240
STEP_S = 0.04  # at least: it is met in the middle, and leaves the cores to the tests beside it
GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Job:
    """found: its controller; None where it was over already when the test looked for it."""

    folder: Path
    found: psutil.Process | None

    @property
    def controller(self) -> psutil.Process:
        assert self.found is not None, self.told()
        return self.found

    @property
    def held(self) -> Path:
        return self.folder.parents[1] / "held"

    def wait_for_samples(self, samples: int) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while samples_seen(self.folder) < samples:
            assert time.monotonic() < deadline_s, self.told()
            time.sleep(0.02)

    def process(self, *words: str) -> psutil.Process:
        """The one below this job whose command line has these words."""
        for process in self.controller.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if set(words) <= set(process.cmdline()):
                    return process
        raise AssertionError(f"no process with {words}\n{self.told()}")

    def rank(self, rank: int) -> psutil.Process:
        for process in self.controller.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "train" in process.cmdline() and process.environ().get("RANK", "0") == str(rank):
                    return process
        raise AssertionError(f"no rank {rank}\n{self.told()}")

    def finish(self) -> list[JobStart]:
        if self.found is not None:
            psutil.wait_procs([self.found], timeout=TIMEOUT_S)
            assert not _lives(self.found), self.told()
        return read_starts(self.folder)

    def told(self) -> str:
        kinds = ("logs/*", "submitit/*_log.*", "attempts/*/*.json")
        files = [path for kind in kinds for path in self.folder.glob(kind)]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in sorted(files))


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Iterator[Path]:
    """And no process of the job is left behind."""
    yield write_tiny_recipe(tmp_path, digits)
    if (controller := controller_of(tmp_path / "runs" / "tiny")) is not None:
        with suppress(psutil.NoSuchProcess):
            for process in [controller, *controller.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def launch(recipe: Path, *overrides: str, num_ranks: int = 2, forked: bool = True, **options: Any) -> Job:
    """Launch a run that waits in the middle, until it is asked to stop or let go. forked: its ranks are."""
    words = ["launch", str(recipe), "--cluster", "local", "--set", f"ranks_per_node={num_ranks}"]
    words += ["--set", "cpus_per_node=2", "--set", "gpus_per_node=0"]
    environment = held_at(recipe.parent / "held", MIDDLE + 5 * GLOBAL_BATCH, STEP_S)
    if not forked:
        del environment["FORKED_RANKS"]
    pomscale(*words, *OVERRIDES, *overrides, env=environment, **options)
    job_folder = recipe.parent / "runs" / "tiny"
    return Job(job_folder, controller_of(job_folder))


def verdict(start: JobStart) -> Verdict:
    assert start.verdict is not None
    return start.verdict


def test_a_killed_rank_starts_the_run_again(recipe: Path, tmp_path: Path, digits: Path) -> None:
    job = launch(recipe)
    job.wait_for_samples(MIDDLE)
    job.rank(1).kill()
    job.held.unlink()
    first, second = job.finish()
    assert verdict(first).action == "requeue"
    assert "rank 1 on" in verdict(first).reason
    assert "was killed by SIGKILL" in verdict(first).reason
    assert verdict(second).action == "done"
    assert outcome(job.folder)["state"] == "finished"
    other = tmp_path / "other"
    other.mkdir()
    train(write_tiny_recipe(other, digits), *OVERRIDES)
    reference = losses(other / "runs" / "tiny")
    assert losses(job.folder) == pytest.approx(reference, rel=1e-3)
    told = (job.folder / "logs" / "rank-00001.log").read_text()
    assert told.count("===== start ") == 2


def test_usr2_saves_and_starts_again_and_sigterm_saves_and_ends(recipe: Path) -> None:
    job = launch(recipe)
    job.wait_for_samples(MIDDLE)
    # As `pomscale runs requeue` does: the process of the job itself, below submitit's controller.
    job.process("submitit.core._submit").send_signal(signal.SIGUSR2)
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(read_starts(job.folder)) < 2:
        assert time.monotonic() < deadline_s, job.told()
        time.sleep(0.1)
    saved = verdict(read_starts(job.folder)[0]).samples
    assert saved is not None
    assert saved >= MIDDLE
    held_at(job.held, saved + 20 * GLOBAL_BATCH)
    job.wait_for_samples(saved + 10 * GLOBAL_BATCH)
    job.controller.terminate()
    _, second = job.finish()
    assert outcome(job.folder)["state"] == "stopped"
    assert outcome(job.folder)["samples"] == checkpoint_samples(job.folder) > saved
    assert "SIGTERM" in verdict(second).reason


def test_a_request_to_end_just_after_one_to_start_again_is_heard(recipe: Path) -> None:
    """`pomscale runs requeue`, then `cancel` while it still saves."""
    job = launch(recipe, num_ranks=1)
    job.wait_for_samples(MIDDLE)
    job.process("submitit.core._submit").send_signal(signal.SIGUSR2)
    job.controller.terminate()
    (only,) = job.finish()
    assert verdict(only).action == "requeue"
    assert outcome(job.folder)["state"] == "stopped"


def test_a_guard_that_is_killed_takes_its_rank_with_it(recipe: Path) -> None:
    job = launch(recipe, num_ranks=1)
    job.wait_for_samples(MIDDLE)
    rank = job.rank(0)
    job.process("launch.guard").kill()
    psutil.wait_procs([rank], timeout=TIMEOUT_S)
    assert not _lives(rank)


def test_an_error_of_its_own_is_told_in_one_line_and_not_repeated(recipe: Path, tmp_path: Path, digits: Path) -> None:
    latents = damaged_copy(digits / "latents" / "train", tmp_path / "latents")
    job = launch(recipe, f"data.path={latents}")
    (only,) = job.finish()
    assert (verdict(only).action, verdict(only).exit_code) == ("fail", 1)
    assert "checksum" in verdict(only).reason
    assert "\n" not in verdict(only).reason
    assert "checksum" in Path(verdict(only).log).read_text()


@pytest.mark.skipif(not os.access(GROUPS, os.W_OK), reason="needs a control group of its own (version 1, as root)")
def test_want_of_memory_is_its_own_fault(recipe: Path) -> None:
    """The kernel sends SIGKILL, as others do; but here the next start would end like this one."""
    group = GROUPS / f"pomscale-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(150 * 2**20))
    # The server of forks is no member of the group.
    job = launch(recipe, num_ranks=1, forked=False, preexec_fn=lambda: (group / "cgroup.procs").write_text("0"))
    (only,) = job.finish()
    assert verdict(only).action == "fail", job.told()
    assert "host memory ran out" in verdict(only).reason
    group.rmdir()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_job_that_is_told_to_end_while_it_starts_ends(recipe: Path, num_ranks: int) -> None:
    """torchrun takes seconds until it has started guards, and they until they listen: the request waits for them."""
    job = launch(recipe, num_ranks=num_ranks)
    deadline_s = time.monotonic() + TIMEOUT_S
    words = ("torch.distributed.run",) if num_ranks > 1 else ("launch.guard",)
    while True:
        with suppress(AssertionError):
            job.process(*words)
            break
        assert time.monotonic() < deadline_s, job.told()
        time.sleep(0.01)
    (task,) = job.controller.children()
    task.send_signal(signal.SIGTERM)
    job.finish()
    assert samples_seen(job.folder) < TOTAL // 2, job.told()


def test_a_job_whose_working_folder_has_gone_says_so(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    spec = JobSpec(str(tmp_path / "home"), "x", [["--help"]], str(folder))
    folder.rmdir()
    submit(spec, load_cluster("local"), SubmitOptions())
    (only,) = Job(tmp_path / "home", controller_of(tmp_path / "home")).finish()
    assert verdict(only).action == "fail"
    assert f"cannot start it in {folder}" in verdict(only).reason
