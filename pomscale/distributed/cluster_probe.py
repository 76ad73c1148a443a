"""The job of `pomscale cluster check`, on every rank: what is here, can we talk, do signals arrive.

Each rank first tells what it finds alone, so that a rendezvous that hangs does not hide the rest.
"""

from __future__ import annotations

import os
import platform
import secrets
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pomscale.distributed.cluster_facts import (
    WORLD_FILE,
    RankFacts,
    WorldFacts,
    rank_path,
    ready_path,
    signal_path,
)
from pomscale.distributed.preflight import all_reduce_speed, preflight, write_speed
from pomscale.distributed.world import World, join_world, resolve_device
from pomscale.errors import PomscaleError
from pomscale.files import make_folder, write_text

_JOIN_S = 120
_SEE_S = 20.0  # a file that takes longer to be seen is not seen
_SIGNAL_S = 60.0
_ANSWER_S = 8.0
_NUM_CLOCK_LOOKS = 9
_SERVERS = {"WANDB_BASE_URL": "https://api.wandb.ai", "HF_ENDPOINT": "https://huggingface.co"}


def probe(folder: Path, *, offline: bool, expect_signal: bool) -> None:
    """Leave in `folder`, shared by all ranks, what cluster_facts describes.

    offline: ask nothing of the internet. expect_signal: then wait for a SIGUSR2, a minute at most. Raises PomscaleError
    where the folder cannot be written; what else is wrong is told in the files, or ends this process.
    """
    arrived = threading.Event()
    signal.signal(signal.SIGUSR2, lambda number, frame: arrived.set())
    make_folder(folder)
    rank, is_first = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    _about_this_rank(folder, rank, is_first=is_first, offline=offline).keep(rank_path(folder, rank))
    start_s = time.perf_counter()
    with join_world("auto", timeout=timedelta(seconds=_JOIN_S)) as world:
        found = _about_all(world, folder, time.perf_counter() - start_s)
        if world.is_main:
            found.keep(folder / WORLD_FILE)
        if expect_signal:
            write_text(ready_path(folder, rank), "")
            if arrived.wait(_SIGNAL_S):
                write_text(signal_path(folder, rank), "")
            world.barrier()


def _about_this_rank(folder: Path, rank: int, *, is_first: bool, offline: bool) -> RankFacts:
    device, has_cuda = resolve_device("auto"), torch.cuda.is_available()
    folders = {}
    if is_first:
        folders = {"runs": folder, "temporary": Path(tempfile.gettempdir()), "home": Path.home()}
    speeds, problems = {}, {}
    for what, path in folders.items():
        try:
            speeds[what] = write_speed(path / f".pomscale-{secrets.token_hex(8)}")
        except OSError as error:
            problems[what] = str(error)
    return RankFacts(
        rank,
        _node(),
        platform.python_version(),
        sys.executable,
        torch.__version__,
        ".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None,
        (torch.cuda.get_device_name(device), str(torch.cuda.get_device_properties(device).uuid)) if has_cuda else None,
        torch.cuda.device_count() if has_cuda else 0,
        len(os.sched_getaffinity(0)),
        [name for _, name in socket.if_nameindex()],
        {what: str(path) for what, path in folders.items()},
        speeds,
        problems,
        _silent_servers() if is_first and not offline else None,
    )


def _node() -> str:
    """As SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _silent_servers() -> str | None:
    """Those of the servers that runs use which do not answer, and why."""
    problems: dict[str, str] = {}

    def ask(url: str) -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWER_S).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError as error:
            problems[url] = str(error)
        else:
            problems.pop(url, None)
            return
        ...

    return None


def _about_all(world: World, folder: Path, join_s: float) -> WorldFacts:
    """The same on all ranks. A collective of some seconds."""
    nodes: list[str] = world.gather(_node())  # type: ignore[assignment]
    seen_after_s = _seen_after_s(world, folder)
    clock_s = _clock_s(world)
    inside_gb_per_s = _inside_gb_per_s(world, nodes)
    problem, warnings, metrics = None, (), {}
    try:
        found = preflight(world, folder, "bf16" if world.device.type == "cuda" else "fp32")
    except PomscaleError as error:
        problem = str(error)
    else:
        warnings, metrics = found.warnings, found.metrics
    ...
