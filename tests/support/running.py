"""Start the real commands as users do, and read what they leave in the run folder.

Commands of Python are forked from a process that has done the imports (support.forking), unless what a test asks for
needs a start from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.record.job import read_submissions
from pomscale.checkpoint.store import find_checkpoint, read_meta, read_tensors
from pomscale.pretrained.load import load_pretrained
from pomscale.runs.history import samples_seen
from support.forking import ENVIRONMENT, ForkedPopen, may_fork, standing_in
from support.paths import TESTS

_UNHURRIED = str(Path(__file__).with_name("unhurried"))
# The environment of runs that a test meets in the middle.
UNHURRIED = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, [_UNHURRIED, os.environ.get("PYTHONPATH")]))}
TIMEOUT_S = 240
KILLED_WITHIN_S = 120  # on a machine with too much to do
GLOBAL_BATCH = 32
NUM_STEPS = 30  # 960 samples: into the second epoch of 901 digits


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def write_tiny_recipe(folder: Path, digits: Path) -> Path:
    """Every step is logged, so that runs can be compared step by step. Without preflight, which waits for the disk."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
kind: train
name: tiny
output: {folder}/runs
codec: {{name: pixel, block: 2, channels: 1}}
data: {{path: {digits}/latents/train, normalization: dataset, flip_probability: 0}}
model: {{latent_shape: [4, 4, 4], num_classes: 10, patch_size: 1, dim: 32, depth: 2, num_heads: 2}}
optimizer: {{lr: 3e-3, weight_decay: 0.01}}
schedule: {{warmup_samples: {5 * GLOBAL_BATCH}, cooldown_samples: {10 * GLOBAL_BATCH}}}
training: {{total_samples: {NUM_STEPS * GLOBAL_BATCH}, global_batch: {GLOBAL_BATCH}}}
compute: {{precision: fp32, device: cpu}}
ema: {{halflives_samples: [200]}}
checkpoint: {{every_samples: {10 * GLOBAL_BATCH}}}
monitoring: {{every_samples: {GLOBAL_BATCH}, wandb: {{mode: disabled}}}}
faults: {{preflight: false}}
"""
    )
    return recipe


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of `size` (640k, 6m) at `folder`; skips the test where none may be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def train_command(recipe: Path, *overrides: str, num_processes: int = 1) -> list[str]:
    launcher = ["-m", "pomscale"]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", *launcher]
    return [sys.executable, *launcher, "train", str(recipe), *overrides]


def run(command: list[str], expect: int | None = 0, timeout: float = TIMEOUT_S, **options: Any) -> Finished:
    """Run a command to its end. The test fails with the command's output if the exit code is not `expect`.

    expect: None if any exit code will do.
    """
    with started(command, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(timeout=timeout)
    assert expect in (None, process.returncode), f"exit code {process.returncode}\n{out[-4000:]}\n{err[-4000:]}"
    return Finished(process.returncode, out, err)


def open_process(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command with the options of subprocess.Popen, forked if it may be; the environment is ENVIRONMENT."""
    options.setdefault("env", ENVIRONMENT)
    return ForkedPopen(command, **options) if may_fork(command, options) else subprocess.Popen(command, **options)


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command. Whatever happens to the test, no process of it is left behind."""
    process = open_process(command, stdout=subprocess.PIPE, text=True, **options)
    known = {process.pid: psutil.Process(process.pid)}
    try:
        yield process
    finally:
        # torchrun's workers have sessions of their own: only the tree tells whose they are.
        with suppress(psutil.NoSuchProcess):
            known.update({child.pid: child for child in known[process.pid].children(recursive=True)})
        for left in known.values():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(KILLED_WITHIN_S)


def wait_until(
    is_so: Callable[[], bool],
    told: Callable[[], object] | str = "",
    timeout_s: float = TIMEOUT_S,
    every_s: float = 0.02,
) -> None:
    """Wait until `is_so()`, or raise AssertionError(told) after a limit that only a hang reaches."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, told() if callable(told) else told
        time.sleep(every_s)


def held_at(file: Path, samples: int, step_s: float = 0.0) -> dict[str, str]:
    """The environment of a run that goes no further than `samples`, while the file is there and says so.

    Until the test has met it: see tests/support/unhurried. 0 samples: not even a local job's controller goes on. The
    ranks of jobs are forked.
    """
    file.write_text(str(samples))
    unhurried = {"PYTHONPATH": UNHURRIED["PYTHONPATH"], "UNHURRIED_S": str(step_s), "UNHURRIED_HELD": str(file)}
    return {**ENVIRONMENT, **unhurried, **standing_in()}


def controller_of(job_folder: Path) -> psutil.Process | None:
    """The process of the newest local job, while it is there. Numbers of processes come again: this is no other's."""
    with suppress(psutil.NoSuchProcess, IndexError):
        process = psutil.Process(int(read_submissions(job_folder)[-1].job_id))
        if str(job_folder) in " ".join(process.cmdline()):
            return process
    return None


def run_tour(code: str, **options: Any) -> Finished:
    """Run Python code that starts a quickstart's commands with subprocess. They are forked where they may be."""
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "ignore"}  # as the quickstarts have it
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    code = f"from support.forking import fork_commands\nfork_commands()\n{code}"
    return run([sys.executable, "-c", code], env=environment, **options)


def pomscale(*arguments: str | Path, expect: int = 0, **options: Any) -> Finished:
    return run([sys.executable, "-m", "pomscale", *map(str, arguments)], expect, **options)


def train(recipe: Path, *overrides: str, num_processes: int = 1, expect: int = 0) -> Finished:
    return run(train_command(recipe, *overrides, num_processes=num_processes), expect)


def start_and_signal(
    recipe: Path, *overrides: str, after_samples: int, number: signal.Signals, num_processes: int = 1
) -> int:
    """Start training, send a signal to every training process once `after_samples` are logged; the exit code.

    Not before this start has logged a step, also where an earlier one was beyond that; and a few steps later at most,
    however late the signal comes. SIGKILL goes to the launcher too, as when a node loses power.
    """
    folder = recipe.parent / "runs" / "tiny"
    command = train_command(recipe, *overrides, num_processes=num_processes)
    logged_before, metrics = samples_seen(folder), folder / "metrics.jsonl"
    num_bytes_before = metrics.stat().st_size if metrics.is_file() else 0
    environment = held_at(recipe.parent / "held", max(after_samples, logged_before) + 4 * GLOBAL_BATCH)
    with started(command, stderr=subprocess.STDOUT, env=environment) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while samples_seen(folder) < after_samples or metrics.stat().st_size == num_bytes_before:
            assert process.poll() is None, f"ended before the signal: {process.stdout.read()}"  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "training did not get to the signal in time"
            time.sleep(0.005)
        launcher = psutil.Process(process.pid)
        children = launcher.children(recursive=True)
        targets = [launcher, *children] if number == signal.SIGKILL or not children else children
        for target in targets:
            with suppress(psutil.NoSuchProcess):
                target.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
        psutil.wait_procs(children, timeout=KILLED_WITHIN_S)
    return process.returncode


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Samples -> loss of the step that ended there; what was done again after a resume counts as last done."""
    return {row["samples"]: row["train/loss"] for row in rows(folder) if "train/loss" in row}


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and optimiser moments of the newest complete checkpoint, by name."""
    checkpoint = find_checkpoint(folder)
    found = {}
    for weights in ("model", "ema"):
        for name, value in load_pretrained(checkpoint, weights=weights, device="cpu").named_parameters():
            found[f"{weights}.{name}"] = value
    there = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    moments = {
        name: {
            key: torch.empty_like(value)
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")
            if f"optimizer.{name}.{key}" in there
        }
        for name, value in load_pretrained(checkpoint, device="cpu").named_parameters()
    }
    assert all(moments.values())
    read_tensors(checkpoint, {"optimizer": moments})
    for name, state in moments.items():
        found.update({f"{key}.{name}": value for key, value in state.items()})
    return found


def damaged_copy(latents: Path, target: Path) -> Path:
    """A dataset with a hole in the middle of its first shard."""
    shutil.copytree(latents, target)
    shard = min(target.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) * 2 // 3] = b"\xff" * (len(content) * 2 // 3 - len(content) // 2)
    shard.write_bytes(content)
    return target


def checkpoint_samples(folder: Path) -> int:
    return read_meta(find_checkpoint(folder))["samples"]


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outcome.json").read_text())


def assert_same_run(folder: Path, reference: Path) -> None:
    """Every loss and every number of the last checkpoint, to the last bit."""
    assert losses(folder) == losses(reference)
    ours, theirs = final_weights(folder), final_weights(reference)
    different = [name for name in theirs if not ours[name].equal(theirs[name])]
    assert not different


def assert_same_curve(ours: dict[int, float], reference: dict[int, float], num_steps: int = NUM_STEPS) -> None:
    """Relative 1e-5 for 10 steps, then 1e-3 (fp32). The reference may go on after `num_steps`."""
    assert list(ours) == list(reference)[:num_steps] == [GLOBAL_BATCH * step for step in range(1, num_steps + 1)]
    for step, (samples, our) in enumerate(ours.items()):
        tolerance = 1e-5 if step < 10 else 1e-3
        assert our == pytest.approx(reference[samples], rel=tolerance), f"step {step}"
