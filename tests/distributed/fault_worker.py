"""One rank of test_fault_modules.py: every module with a fault in one rank, and the last fault is a hang."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from pomscale.base.errors import PomscaleError
from pomscale.distributed import probe
from pomscale.distributed.consistency import check_replicas
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.preflight import Preflight, preflight
from pomscale.distributed.probe import MatmulProbe
from pomscale.distributed.stragglers import Stragglers
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World, join_world
from pomscale.runs.metric_names import METRICS

HOST = socket.gethostname()


@contextmanager
def fault(here: bool, owner: Any, name: str, broken: Any) -> Iterator[None]:
    """In the ranks that have it, `owner.name` is broken for the block."""
    right = getattr(owner, name)
    if here:
        setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, right)


def problem(world: World, check: Any, *arguments: Any) -> str:
    """The PomscaleError that all ranks raise, which must be one and the same."""
    told = ""
    try:
        check(*arguments)
    except PomscaleError as error:
        told = str(error)
    assert world.gather(told) == [told] * world.size
    assert told, "no error was raised"
    return told


def check_preflight(world: World, folder: Path) -> None:
    if world.is_main:
        (folder / ".preflight-of-a-start-that-was-killed").touch()
    sound = preflight(world, folder, "bf16")
    assert not list(folder.iterdir())
    assert world.gather(sound) == [sound] * world.size
    assert "TFLOP/s (slowest " in sound.line
    assert f"over {world.size} ranks" in sound.line
    assert all(value > 0 for value in sound.metrics.values())

    multiply, reduce, seconds = torch.mm, dist.all_reduce, MatmulProbe.seconds

    def one_wrong_entry(a: Tensor, b: Tensor, out: Tensor) -> None:
        multiply(a, b, out=out)
        out[len(out) // 2, 3] *= 1.5

    def lost_packet(values: Tensor, **options: Any) -> None:
        reduce(values, **options)
        values[values.numel() // 2 :] += 1

    with fault(world.rank == 1, torch, "mm", one_wrong_entry):
        told = problem(world, preflight, world, folder, "fp32")
    assert told == f"preflight: rank 1 on {HOST}: a matrix product is wrong: this device is damaged, exclude the host"
    with fault(world.rank == 2, dist, "all_reduce", lost_packet):
        told = problem(world, preflight, world, folder, "fp32")
    assert told.startswith(f"preflight: rank 2 on {HOST}: an all-reduce gave a wrong sum")
    # Another node, which has a folder of its own under that path.
    with fault(world.rank == 1, socket, "gethostname", lambda: "node-b"):
        elsewhere = folder / "mounted-nowhere" if world.rank == 1 else folder
        told = problem(world, preflight, world, elsewhere, "fp32")
    assert told.startswith("preflight: rank 1 on node-b: ")
    assert "put it on a file system that all hosts share" in told
    with fault(world.rank == 0, Path, "touch", Path.rmdir):  # root may write anywhere, so a real one cannot be had here
        told = problem(world, preflight, world, folder, "fp32")
    assert told.startswith(f"preflight: rank 0 on {HOST}: cannot write into {folder}: ")
    with fault(world.rank == 2, MatmulProbe, "seconds", lambda probe, num_tries=1: 10 * seconds(probe, num_tries)):
        slow: Preflight = preflight(world, folder, "fp32")
    assert [warning for warning in slow.warnings if warning.startswith(f"rank 2 on {HOST}: matmul")]
    assert not list(folder.iterdir())


def check_stragglers(world: World) -> None:
    stragglers = Stragglers(world)
    if world.rank == 2:
        stragglers._probe._num_products *= 6  # really six times as much to compute
    reports = [stragglers.report(step_time_s=0.1, data_wait_s=0.01) for _ in range(5)]
    assert world.gather(reports) == [reports] * world.size
    for report in reports:
        assert report.metrics["ranks/slowest_rank"] == 2
        assert report.metrics["ranks/slowest_host"] == HOST
        assert report.metrics["ranks/compute_slowdown"] > 2
    assert [report.warning is not None for report in reports] == [False, False, True, False, False]
    # Whoever is named tells what its host is doing, and nobody else does; again after as many reports.
    assert [report.named for report in reports] == [None, None, 2, None, None]
    told = [{name for name in report.metrics if name.startswith("straggler/")} for report in reports]
    assert [bool(names) for names in told] == [False, False, True, False, False]
    assert told[2] <= METRICS.keys()
    named = reports[2].metrics
    assert (named["straggler/rank"], named["straggler/host"]) == (2, HOST)
    resident = world.gather(psutil.Process().memory_info().rss / 2**30)
    assert named["straggler/process_memory_gib"] == pytest.approx(resident[2], rel=0.2)
    assert stragglers.report(step_time_s=0.1, data_wait_s=0.01).named == 2
    assert str(reports[2].warning).startswith(f"rank 2 on {HOST} computes ")
    if world.rank == 2:
        stragglers._probe._num_products //= 6
    waits = [stragglers.report(step_time_s=0.1, data_wait_s=1.0 if world.rank == 0 else 0.01) for _ in range(3)]
    assert waits[0].metrics["ranks/data_wait_rank"] == 0
    assert str(waits[2].warning).startswith(f"rank 0 on {HOST} waits for its data ")


def check_consistency(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "bias": torch.randn(7, generator=generator),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "sharded": distribute_tensor(torch.randn(6, 4, generator=generator), mesh, [Replicate()]),
        "flat": FlatShard((4, 3), 2, torch.randn(5, generator=generator)),
        "transposed": torch.randn(4, 9, generator=generator).T,
    }
    everybody = dist.group.WORLD
    assert everybody is not None
    check_replicas(world, everybody, tensors)

    local = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in tensors.items()}
    local["flat"] = tensors["flat"].values  # type: ignore[assignment]
    assert isinstance(tensors["sharded"], DTensor)
    for name, rank in itertools.product(("bias", "half", "sharded", "flat", "transposed"), (0, 2)):
        whole = local[name].clone()
        if world.rank == rank:
            bits = local[name].view(torch.int16 if name == "half" else torch.int32)
            bits[-1] ^= 1  # the last bit of some elements
        told = problem(world, check_replicas, world, everybody, tensors)
        assert told.startswith(f"rank {rank} ({HOST}): its copy of {name} is not that of the 2 other ranks: ")
        local[name].copy_(whole)
    if world.rank == 1:  # two elements change places; and a zero its sign
        local["bias"][[2, 5]] = local["bias"][[5, 2]]
    assert "its copy of bias" in problem(world, check_replicas, world, everybody, tensors)
    if world.rank == 1:
        local["bias"][[2, 5]] = local["bias"][[5, 2]]
    zeros = {"zeros": torch.zeros(4)}
    zeros["zeros"][1] *= -1 if world.rank == 1 else 1
    assert "rank 1 (" in problem(world, check_replicas, world, everybody, zeros)

    # Ranks 0 and 2 are copies of each other, 1 is alone, as in a mesh of shards.
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    mine = alone if world.rank == 1 else pair
    differing = {"weight": torch.full((3,), float(world.rank == 1))}
    check_replicas(world, mine, differing)
    differing["weight"] += float(world.rank)
    told = problem(world, check_replicas, world, mine, differing)
    assert told.startswith(f"ranks 0 ({HOST}), 2 ({HOST}): their copies of weight differ, and no majority tells")


def tell(folder: Path, world: World, reason: str) -> None:
    """Write an outcome, and wait until all ranks have: the others end with the first, before their watchdogs look."""
    outcomes = [folder / f"outcome-{rank}" for rank in range(world.size)]
    outcomes[world.rank].write_text(reason)
    while not all(path.exists() for path in outcomes):
        time.sleep(0.01)


def asleep() -> None:
    time.sleep(100)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Matrix products are timed by the processor time that they took: what else runs on this machine must be no fault.
    probe.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[assignment]
    with join_world("cpu") as world:
        (folder / "run").mkdir(exist_ok=True)
        world.barrier()
        check_preflight(world, folder / "run")
        check_stragglers(world)
        check_consistency(world)
        print("all faults are found", flush=True)
        stacks = folder / "stacks" / f"rank-{world.rank}.txt"
        with Watchdog(3.0, 60.0, stacks, partial(tell, folder, world)) as watchdog:
            for step in range(10):
                watchdog.beat()
                if step == 2 and world.rank == 1:
                    asleep()
                world.barrier()
    os._exit(0)
