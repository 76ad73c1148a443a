"""World of a run: its processes, the rank of this one, and its device.

The module works the same alone and under torchrun, SLURM or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.hosts import name_problem

# Until all ranks are there. They start within minutes of each other, since torch may be slow to load.
_JOIN_TIMEOUT = timedelta(minutes=10)
_DEFAULT_TIMEOUT = timedelta(minutes=30)  # torch's own

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size` processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Return the elementwise sum of numbers and scalar tensors over all ranks, in float64.

        A collective: every rank calls it with the same length. Waits for the device once, for all of them.
        """
        # float64 on every backend, so that a count or a loss never loses digits on the way.
        scalars = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        tensor = torch.stack(scalars)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: object) -> list[object]:
        """Return the picklable objects of all ranks, in rank order, on every rank. A collective; not for large data."""
        gathered: list[object] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 alone, and return its picklable result, or raise its PomscaleError, on every rank.

        A collective. It lets all ranks agree on what is on disk: a shared file system may show a new file to some
        ranks later than to others.
        """
        outcome: object = None
        if self.is_main:
            try:
                outcome = function()
            except PomscaleError as error:
                outcome = error
        found: Any = self.gather(outcome)[0]
        if isinstance(found, PomscaleError):
            raise found
        return found

    def barrier(self) -> None:
        """Wait for all ranks. A collective."""
        self.sum([0.0])


def resolve_device(device: str) -> torch.device:
    """Return this process's device for "auto" (cuda where there is one), "cpu" or "cuda".

    Raises InputError for another word, and when cuda is asked for and absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: must be auto, cpu or cuda, got {device!r}")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise InputError("device: cuda was asked for, but torch sees no GPU here; use auto or cpu")
    if device == "cpu" or not has_cuda:
        return torch.device("cpu")
    # With some launchers a process sees all GPUs of its node, with others only its own.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _join(backend: str, join_timeout: timedelta, timeout: timedelta) -> None:
    """Join the other ranks, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    torch has one timeout for the join and for collectives, and would wait for a host that is not there as long as for
    a collective. Raises PomscaleError, which names what was waited for.
    """
    first = os.environ.get("MASTER_ADDR", "")
    if first and (problem := name_problem(first)) is not None:
        raise PomscaleError(problem)
    began_s = time.monotonic()
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=join_timeout)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=join_timeout)
    except RuntimeError as error:  # torch's own are of this class, and gloo's
        rank_name, num_ranks, port = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise PomscaleError(
            f"rank {rank_name} on {socket.gethostname()} did not find all {num_ranks} ranks at {first} port {port}, "
            f"after {time.monotonic() - began_s:.1f} s: {why}"
        ) from error
    store.set_timeout(timeout)
    _set_pg_timeout(timeout)


@contextmanager
def join_world(
    device: str, *, timeout: timedelta | None = None, join_timeout: timedelta = _JOIN_TIMEOUT
) -> Iterator[World]:
    """Join the world of a run, or make one of this process alone, for the duration of the block.

    After an error on GPUs the world is not left before the process ends: NCCL would wait there for the other ranks,
    which may be waiting for this one.

    Args:
        device: see resolve_device, and the errors that it raises.
        timeout: longest wait in a collective that other ranks do not enter; None = torch's default.
        join_timeout: longest wait until all ranks are there.

    Raises:
        PomscaleError: the other ranks are not found, with the host and the port at which they were to meet.
    """
    this_device = resolve_device(device)
    if this_device.type == "cuda":
        torch.cuda.set_device(this_device)
    backend = "cpu:gloo,cuda:nccl" if this_device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _join(backend, join_timeout, timeout or _DEFAULT_TIMEOUT)
    else:  # alone: a store in memory needs no port, so any number of runs fit on one machine
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = World(dist.get_rank(), dist.get_world_size(), this_device)
    try:
        yield world
    except BaseException:
        if world.size == 1 or this_device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
