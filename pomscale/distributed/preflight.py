"""Check, before the first step, that every rank computes, communicates and writes rightly, and as fast as the others.

One slow or broken machine of a hundred slows or breaks the whole run; a few seconds at the start find it.
"""

from __future__ import annotations

import os
import secrets
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from pomscale.base.errors import PomscaleError
from pomscale.distributed.probe import MatmulProbe
from pomscale.distributed.world import World
from pomscale.runs.layout import PREFLIGHT_PREFIX

_SLOW = 0.7  # a speed below this share of the median is worth a warning
_WRITE_CHUNK = 4 << 20
_MAX_WRITTEN = 64 << 20
_MAX_WRITE_S = 1.0  # enough to find a slow disk
_NUM_REDUCES = 4  # the first one makes the connections


@dataclass(frozen=True)
class Preflight:
    """Result, the same on all ranks: a line of figures, warnings of slow ranks, and preflight/* (runs.metric_names)."""

    line: str
    warnings: tuple[str, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Rank:
    """Findings of one rank: write_gb_per_s is None unless it writes for its host; a problem makes a run impossible."""

    where: str
    matmul_tflops: float
    reduce_gb_per_s: float
    write_gb_per_s: float | None
    problem: str | None


def preflight(world: World, run_folder: Path, precision: Literal["fp32", "bf16"]) -> Preflight:
    """Time each rank's matrix products, an all-reduce, and writing into the run folder, by one rank per host.

    A collective of a few seconds; the folder must exist. Raises PomscaleError on all ranks, naming rank and host, where
    a product or a sum is wrong, or the folder cannot be written or is not the same one on all hosts.
    """
    hosts = world.gather(socket.gethostname())
    writes = hosts.index(hosts[world.rank]) == world.rank  # the first rank of each host
    where = f"rank {world.rank} on {hosts[world.rank]}"
    tflops, problem = _matmul(world, torch.bfloat16 if precision == "bf16" else torch.float32)
    reduce_gb_per_s, reduce_problem = _all_reduce(world)
    gb_per_s, write_problem = _write(world, run_folder, writes)
    found = _Rank(where, tflops, reduce_gb_per_s, gb_per_s, problem or reduce_problem or write_problem)
    ranks: list[_Rank] = world.gather(found)  # type: ignore[assignment]
    problems = [f"{rank.where}: {rank.problem}" for rank in ranks if rank.problem is not None]
    if problems:
        raise PomscaleError(f"preflight: {'; '.join(problems)}")
    return _summary(ranks)


def _matmul(world: World, dtype: torch.dtype) -> tuple[float, str | None]:
    """Return the TFLOP/s of this rank, and the problem if a product is wrong."""
    probe = MatmulProbe(world.device, dtype)
    tflops = probe.num_flops / probe.seconds(num_tries=5) / 1e12
    return tflops, None if probe.is_right() else "a matrix product is wrong: this device is damaged, exclude the host"


def _all_reduce(world: World) -> tuple[float, str | None]:
    """Return the GB/s of an all-reduce over all ranks, and the problem if a sum is wrong."""
    gb_per_s, is_right = all_reduce_speed(world.device)
    return gb_per_s, None if is_right else "an all-reduce gave a wrong sum: a device or the network is damaged there"


def all_reduce_speed(device: torch.device, group: dist.ProcessGroup | None = None) -> tuple[float, bool]:
    """Return the bus bandwidth in GB/s, as nccl-tests defines it, and whether all sums were right.

    A collective of all ranks, or of those of a group. The sum of small integers is exact in fp32.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    num_elements = (64 << 20 if device.type == "cuda" else 1 << 20) // 4
    pattern = torch.arange(num_elements, dtype=torch.float32, device=device) % 1024
    expected = pattern * size + size * (size - 1) / 2
    seconds, all_right = [], True
    for _ in range(_NUM_REDUCES):
        values = pattern + rank
        start = torch.zeros(1, device=device)
        dist.all_reduce(start, group=group)
        start.item()  # waits for the device, so that all begin together
        start_s = time.perf_counter()
        dist.all_reduce(values, group=group)
        all_right = bool(values.equal(expected)) and all_right  # waits for the device
        seconds.append(time.perf_counter() - start_s)
    return 2 * (size - 1) / size * values.nbytes / min(seconds) / 1e9, all_right


def _write(world: World, run_folder: Path, writes: bool) -> tuple[float | None, str | None]:
    """Return the GB/s with fsync of a rank that writes for its host, and the problem. A collective of all ranks."""
    mark = run_folder / f"{PREFLIGHT_PREFIX}{world.gather(secrets.token_hex(8))[0]}"
    problem = _touch(mark) if world.is_main else None
    could_mark = world.gather(problem)[0] is None
    speed = None
    if writes and could_mark:
        # The name is new, so that no cache of a network file system can answer for it.
        if not mark.exists():
            problem = f"{run_folder} is not rank 0's folder of that name: put it on a file system that all hosts share"
        else:
            try:
                speed = write_speed(mark.with_name(f"{mark.name}-{world.rank}"))
            except OSError as error:
                problem = f"cannot write into {run_folder}: {error}"
    world.barrier()
    if world.is_main:
        mark.unlink(missing_ok=True)
    return speed, problem


def _touch(path: Path) -> str | None:
    try:
        for left in path.parent.glob(f"{PREFLIGHT_PREFIX}*"):  # left by a start that was killed here
            left.unlink(missing_ok=True)
        path.touch()
    except OSError as error:
        return f"cannot write into {path.parent}: {error}"
    return None


def write_speed(path: Path) -> float:
    """Return the GB/s at which a file is written and made durable; it is removed."""
    chunk = os.urandom(_WRITE_CHUNK)  # no file system compresses it
    written, start_s = 0, time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < _MAX_WRITTEN and time.perf_counter() - start_s < _MAX_WRITE_S:
                written += file.write(chunk)
            os.fsync(file.fileno())
        return written / (time.perf_counter() - start_s) / 1e9
    finally:
        path.unlink(missing_ok=True)


def _summary(ranks: list[_Rank]) -> Preflight:
    matmul = {rank.where: rank.matmul_tflops for rank in ranks}
    writing = {rank.where: rank.write_gb_per_s for rank in ranks if rank.write_gb_per_s is not None}
    reduce = statistics.median(rank.reduce_gb_per_s for rank in ranks)
    metrics = {
        "preflight/matmul_tflops": statistics.median(matmul.values()),
        "preflight/matmul_slowest_tflops": min(matmul.values()),
        "preflight/write_gb_per_s": statistics.median(writing.values()),
        "preflight/write_slowest_gb_per_s": min(writing.values()),
    }
    line = f"preflight: matmul {_range(matmul, 'TFLOP/s')} per rank, writing {_range(writing, 'GB/s')} per host"
    if len(ranks) > 1:
        metrics["preflight/all_reduce_gb_per_s"] = reduce
        line += f", all-reduce {reduce:.3g} GB/s over {len(ranks)} ranks"
    warnings = (*_slow(matmul, "matmul at {:.3g} TFLOP/s"), *_slow(writing, "writes {:.3g} GB/s"))
    return Preflight(line, warnings, metrics)


def _range(speeds: dict[str, float], unit: str) -> str:
    low, middle = min(speeds.values()), statistics.median(speeds.values())
    return f"{middle:.3g} {unit}" + (f" (slowest {low:.3g})" if len(speeds) > 1 else "")


def _slow(speeds: dict[str, float], form: str) -> list[str]:
    median = statistics.median(speeds.values())
    return [
        f"{where}: {form.format(speed)}, {speed / median:.0%} of the median: it slows all others down"
        for where, speed in speeds.items()
        if speed < _SLOW * median
    ]
