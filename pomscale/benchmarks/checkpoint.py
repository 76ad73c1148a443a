"""`pomscale bench checkpoint`: the stall of training by a save, and the duration of saves and loads.

One process saves a DiPoM with Adam's two moments and one average, fp32, to a real disk, with fsync. Synchronous saves,
asynchronous ones and those of torch's own `async_save` take turns, so that all meet the same disk. The asynchronous
ones are measured twice: in an idle process, and in one that trains a perceptron in the meantime.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pomscale.base.errors import InputError, PomscaleError
from pomscale.benchmarks.report import BenchReport
from pomscale.checkpoint.staging import leaves
from pomscale.checkpoint.store import CheckpointStore, Saved
from pomscale.config.engine import CheckpointConfig
from pomscale.config.model import ImageModelConfig
from pomscale.distributed.world import join_world
from pomscale.models import DiPoM
from pomscale.runs.integrity import find_damage

_WANTED_STALL = 0.15
_NUM_FOLDERS = 4  # each of two stores keeps one, one is being written, and one is spare


def bench_checkpoint(*, depth: int, num_saves: int, folder: Path | None) -> BenchReport:
    """Measure saves and loads of a DiPoM.

    Args:
        depth: number of blocks of 768 channels; 15 are 200 M parameters, 3.2 GB of state.
        num_saves: number of saves of each kind.
        folder: folder to write into; None = the system's temporary folder.

    Raises:
        InputError: if the folder's disk has too little space.
    """
    report = BenchReport("checkpoint")
    state, num_parameters = _training_state(depth)
    num_bytes = sum(tensor.nbytes for _, tensor in leaves(state))
    with join_world("cpu"), tempfile.TemporaryDirectory(prefix="pomscale-bench-", dir=folder) as temporary:
        root = Path(temporary)
        _check_room(root, _NUM_FOLDERS * num_bytes)
        report.add("state", parameters_m=num_parameters / 1e6, gib=num_bytes / 2**30)
        saved = _saves(report, root, state, num_saves)
        _loads(report, root / "asynchronous", state, num_bytes)
    ratio = {kind: saved[kind] / saved["synchronous"] for kind in saved}
    report.compare("stall of an asynchronous save over a synchronous save, idle", ratio["idle"], _WANTED_STALL, False)
    report.compare("the same while training", ratio["training"], _WANTED_STALL, False)
    report.compare("stall over that of torch's async_save", saved["idle"] / saved["torch"], 1.0, False)
    return report


def _training_state(depth: int) -> tuple[dict[str, Any], int]:
    """Return a state as Engine.state_dict lays it out, with distinct numbers, and its number of parameters."""
    config = ImageModelConfig(
        latent_shape=(4, 32, 32), num_classes=1000, patch_size=2, dim=768, depth=depth, num_heads=12
    )
    with torch.device("meta"):
        model = DiPoM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def tensors() -> dict[str, Tensor]:
        return {name: torch.rand(shape) for name, shape in shapes.items()}

    exp_avg, exp_avg_sq = tensors(), tensors()
    moments = {
        name: {"exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name], "step": torch.tensor(1.0)} for name in shapes
    }
    state = {"model": tensors(), "optimizer": moments, "ema": {"halflife-500000": tensors()}}
    return state, sum(shape.numel() for shape in shapes.values())


def _check_room(root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise InputError(
            f"{root}: {free / 2**30:.1f} GiB are free and {num_bytes / 2**30:.1f} are needed; "
            "name another folder with --folder, or measure a smaller model with --depth"
        )


def _saves(report: BenchReport, root: Path, state: dict[str, Any], num_saves: int) -> dict[str, float]:
    """Return the median stall in s by kind: synchronous, idle and training (both asynchronous), torch."""
    stores = {
        mode: CheckpointStore(root / mode, CheckpointConfig(every_samples=1, keep_last=1, asynchronous=is_async), None)
        for mode, is_async in (("synchronous", False), ("asynchronous", True))
    }
    first = _save(
        stores["asynchronous"], 1, state, lambda: None
    )  # this save allocates the memory that the others reuse
    report.add("asynchronous, first save", stall_s=first.stall_s, total_s=first.total_s)
    step = _training_step()
    kinds: dict[str, Callable[[int], Saved]] = {
        "synchronous": lambda n: _save(stores["synchronous"], n, state, lambda: None),
        "idle": lambda n: _save(stores["asynchronous"], n, state, lambda: time.sleep(0.01)),
        "torch": lambda n: _save_with_torch(root / "torch", state),
        "training": lambda n: _save(stores["asynchronous"], n, state, step),
    }
    saves: dict[str, list[Saved]] = {kind: [] for kind in kinds}
    number = 1
    for _ in range(num_saves):
        for kind, save in kinds.items():
            number += 1
            saves[kind].append(save(number))
    names = {
        "synchronous": "synchronous",
        "idle": "asynchronous, idle",
        "training": "asynchronous, while training",
        "torch": "torch's async_save, idle",
    }
    for kind, name in names.items():
        stalls, totals = [save.stall_s for save in saves[kind]], [save.total_s for save in saves[kind]]
        report.add(
            name,
            stall_s=statistics.median(stalls),
            largest_stall_s=max(stalls),
            total_s=statistics.median(totals),
            num_saves=num_saves,
        )
    return {kind: statistics.median(save.stall_s for save in saves[kind]) for kind in kinds}


def _save(store: CheckpointStore, samples: int, state: dict[str, Any], meanwhile: Callable[[], object]) -> Saved:
    """Save once, and call `meanwhile` over and over until the save is complete."""
    store.save(samples, state, {"samples": samples})
    while (saved := store.poll()) is None:
        meanwhile()
    return saved


def _save_with_torch(folder: Path, state: dict[str, Any]) -> Saved:
    """Save by torch's async_save as its documentation shows, with a process group of its own, and fsync by default."""
    group = dist.new_group(backend="gloo")
    start_s = time.perf_counter()
    done = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    stall_s = time.perf_counter() - start_s
    done.result()  # type: ignore[union-attr]  # without a stager it returns a future
    total_s = time.perf_counter() - start_s
    shutil.rmtree(folder)
    return Saved(0, stall_s, total_s, 0)


def _training_step() -> Callable[[], None]:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 1024)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loads(report: BenchReport, root: Path, state: dict[str, Any], num_bytes: int) -> None:
    """Measure checking and loading, from the page cache if it holds the state; a wrong state gets no figure."""
    store = CheckpointStore(root, CheckpointConfig(every_samples=1), None)
    folder = store.newest()
    assert folder is not None
    start_s = time.perf_counter()
    damage = find_damage(folder)
    report.add("check of integrity", seconds=(s := time.perf_counter() - start_s), gib_per_s=num_bytes / 2**30 / s)
    loaded = _empty_like(state)
    start_s = time.perf_counter()
    store.load(folder, loaded)
    report.add("load", seconds=(s := time.perf_counter() - start_s), gib_per_s=num_bytes / 2**30 / s)
    found = dict(leaves(loaded))
    if damage is not None or any(not tensor.equal(found[name]) for name, tensor in leaves(state)):
        raise PomscaleError(f"{folder}: what was saved is not what came back ({damage}): no figure")


def _empty_like(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _empty_like(value) if isinstance(value, dict) else torch.empty_like(value) for key, value in state.items()
    }
