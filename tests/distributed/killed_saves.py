"""Saves that are killed: a program that does it in children of its own, since what has torch already forks quickly.

killed_saves.py steps FOLDER     a kill before every single step on the file system, from first to last
killed_saves.py moments FOLDER   kills at random moments of endless saving
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomscale.checkpoint.store import CheckpointStore, read_meta, read_tensors
from pomscale.config.engine import CheckpointConfig
from pomscale.distributed.world import join_world
from pomscale.runs.checkpoint_folder import complete_checkpoints, incomplete_checkpoints, samples_of
from pomscale.runs.integrity import find_damage
from pomscale.runs.starts import Start

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
NUM_ROUNDS = 15


def state(samples: int, size: int) -> dict[str, Any]:
    return {"model": {"a": torch.full((size,), float(samples)), "b": torch.arange(size) + samples}}


def open_store(run: Path, asynchronous: bool = True) -> CheckpointStore:
    config = CheckpointConfig(every_samples=10, keep_last=2, asynchronous=asynchronous)
    return CheckpointStore(run / "checkpoints", config, Start.claim(run))


def save(store: CheckpointStore, samples: int, size: int) -> None:
    store.save(samples, state(samples, size), {"samples": samples})
    store.wait()


def check(run: Path, size: int) -> list[int]:
    """Samples of the complete checkpoints; every one of them is whole and says what was saved."""
    complete = complete_checkpoints(run / "checkpoints")
    for folder in complete:
        assert find_damage(folder) is None
        assert read_meta(folder) == {"samples": samples_of(folder)}
        loaded: dict[str, dict[str, Tensor]] = state(0, size)
        read_tensors(folder, loaded)
        for name, tensor in state(samples_of(folder), size)["model"].items():
            assert loaded["model"][name].equal(tensor), (folder, name)
    return [samples_of(folder) for folder in complete]


def in_child(work: Callable[[], None]) -> int:
    """A child at work; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with join_world("cpu"):
            work()
        status = 0
    except BaseException:  # noqa: BLE001  # the child must not go on as its parent
        traceback.print_exc()
    os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_step(number: int) -> None:
    """Python tells of every file that is opened for writing, renamed or deleted; it has no way to take a hook back."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in STEPS:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def kill_before_every_step(folder: Path) -> None:
    template = folder / "template"

    def prepare() -> None:
        store = open_store(template)
        for samples in (10, 20):
            save(store, samples, 50)

    assert ended(in_child(prepare)) == 0
    torn = template / "checkpoints" / "samples-000000000025.g00001.partial"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"left by a kill of the first start")

    seen, number = [], 0
    while True:
        run = folder / f"{number}"
        shutil.copytree(template, run)

        def killed(run: Path = run, number: int = number) -> None:
            store = open_store(run)
            die_before_step(number)
            save(store, 30, 50)

        def next_start(run: Path = run) -> None:
            store = open_store(run)
            newest = store.newest()
            assert newest is not None
            save(store, samples_of(newest) + 10, 50)

        status = ended(in_child(killed))
        complete = check(run, 50)
        assert complete in ([10, 20], [10, 20, 30], [20, 30]), complete
        seen.append(complete)
        assert ended(in_child(next_start)) == 0
        assert check(run, 50) == [complete[-1], complete[-1] + 10]
        assert incomplete_checkpoints(run / "checkpoints") == []
        number += 1
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert seen == sorted(seen)  # the commit is one step: before it the old ones, after it the new one too
    assert [10, 20, 30] in seen
    print(f"killed before each of {number - 1} steps")


def kill_at_random_moments(folder: Path) -> None:
    size = 500_000
    moments = random.Random(0)
    newest, num_torn = 0, 0

    def train(signal_to: int, first: bool) -> None:
        store = open_store(folder)
        latest = store.newest()
        samples = 0 if latest is None else samples_of(latest)
        if first:  # however slow this machine is, something is saved
            samples += 1
            save(store, samples, size)
        os.write(signal_to, b".")
        while True:
            samples += 1
            store.save(samples, state(samples, size), {"samples": samples})  # waits for the one before

    for number in range(NUM_ROUNDS):
        ready, signal_to = os.pipe()
        pid = in_child(lambda signal_to=signal_to, first=number == 0: train(signal_to, first))  # type: ignore[misc]
        os.close(signal_to)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        complete = check(folder, size)
        assert complete == sorted(complete)
        assert not complete or complete[-1] >= newest
        newest = complete[-1] if complete else 0
        num_torn += bool(incomplete_checkpoints(folder / "checkpoints"))
    assert newest > 0
    assert num_torn > 0
    print(f"killed at {NUM_ROUNDS} moments, {num_torn} inside a save, {newest} saved")


if __name__ == "__main__":
    {"steps": kill_before_every_step, "moments": kill_at_random_moments}[sys.argv[1]](Path(sys.argv[2]))
