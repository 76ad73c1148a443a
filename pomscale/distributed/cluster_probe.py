"""Job of `pomscale cluster check` on every rank: it readings at the node, communicates, and waits for a signal.

Each rank first writes what it finds alone, so that a rendezvous that hangs does not hide the rest.
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist

from pomscale.base.errors import PomscaleError
from pomscale.base.files import make_folder, write_text
from pomscale.distributed.preflight import all_reduce_speed, preflight, write_speed
from pomscale.distributed.world import World, join_world, resolve_device
from pomscale.runs.cluster_facts import WORLD_FILE, RankFacts, WorldFacts, rank_path, ready_path, signal_path

_JOIN_S = 120.0
_SEE_S = 20.0  # a file that takes longer to be seen is never seen
_SIGNAL_S = 60.0
_ANSWER_S = 8.0
_NUM_CLOCK_READINGS = 9


def probe(folder: Path, *, offline: bool, expect_signal: bool) -> None:
    """Write the files that runs.cluster_facts describes into `folder`, which all ranks share.

    Other problems than the one below are written into the files, or end this process.

    Args:
        folder: the shared folder.
        offline: do not look for servers in the internet.
        expect_signal: wait for SIGUSR2 at the end, a minute at most.

    Raises:
        PomscaleError: the folder cannot be written.
    """
    arrived: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: arrived.append(number))
    make_folder(folder)
    rank, is_first = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    _rank_facts(folder, rank, is_first=is_first, offline=offline).keep(rank_path(folder, rank))
    start_s = time.perf_counter()
    limit = timedelta(seconds=_JOIN_S)
    with join_world("auto", timeout=limit, join_timeout=limit) as world:
        facts = _world_facts(world, folder, join_s=time.perf_counter() - start_s)
        if world.is_main:
            facts.keep(folder / WORLD_FILE)
        if expect_signal:
            _wait_for_signal(arrived, folder, rank)
            world.barrier()


def _wait_for_signal(arrived: list[int], folder: Path, rank: int) -> None:
    write_text(ready_path(folder, rank), "")
    deadline_s = time.monotonic() + _SIGNAL_S
    while not arrived and time.monotonic() < deadline_s:
        time.sleep(0.02)
    if arrived:
        write_text(signal_path(folder, rank), "")


def _rank_facts(folder: Path, rank: int, *, is_first: bool, offline: bool) -> RankFacts:
    folders = {}
    if is_first:
        folders = {"runs": folder, "temporary": Path(tempfile.gettempdir()), "home": Path.home()}
    speeds, problems = {}, {}
    for what, path in folders.items():
        try:
            speeds[what] = write_speed(path / f".pomscale-{secrets.token_hex(8)}")
        except OSError as error:
            problems[what] = str(error)
    has_cuda = torch.cuda.is_available()
    return RankFacts(
        rank=rank,
        node=_node(),
        python=platform.python_version(),
        executable=sys.executable,
        torch=torch.__version__,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None,
        gpu=_gpu(resolve_device("cuda")) if has_cuda else None,
        num_gpus=torch.cuda.device_count() if has_cuda else 0,
        num_cores=len(os.sched_getaffinity(0)),
        interfaces=[name for _, name in socket.if_nameindex()],
        folders={what: str(path) for what, path in folders.items()},
        write_gb_per_s=speeds,
        cannot_write=problems,
        internet=_silent_servers() if is_first and not offline else None,
    )


def _gpu(device: torch.device) -> tuple[str, str]:
    """Return name and identity of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(properties.uuid)


def _node() -> str:
    """Return the name of this node in SLURM, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _silent_servers() -> str | None:
    """Return the servers that runs use and that do not answer, with the reasons; None if all answer."""
    urls = [os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), "https://huggingface.co"]
    answers: dict[str, str] = {}
    # In threads: without a network, to look up a name may take minutes.
    threads = [Thread(target=_ask, args=(url, answers), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + _ANSWER_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    silent = {url: answers.get(url, "no answer") for url in urls}
    return "; ".join(f"{url}: {why}" for url, why in silent.items() if why) or None


def _ask(url: str, answers: dict[str, str]) -> None:
    """Note in `answers` why a URL does not answer, "" if it does. Any status is an answer; a proxy is used if set."""
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        answers[url] = ""
    except (OSError, HTTPException, ValueError) as error:
        answers[url] = str(error)
    else:
        answers[url] = ""


def _world_facts(world: World, folder: Path, join_s: float) -> WorldFacts:
    """Measure what all ranks find together; the result is the same on all. A collective of some seconds."""
    nodes: list[str] = world.gather(_node())  # type: ignore[assignment]
    seen_after_s = _seen_after_s(world, nodes, folder)
    clock_s = _clock_s(world, nodes)
    inside_gb_per_s, problem = _inside_gb_per_s(world, nodes)
    warnings: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    try:
        found = preflight(world, folder, "bf16" if world.device.type == "cuda" else "fp32")
        warnings, metrics = found.warnings, found.metrics
    except PomscaleError as error:
        problem = str(error)
    return WorldFacts(
        num_ranks=world.size,
        join_s=join_s,
        problem=problem,
        warnings=list(warnings),
        matmul_tflops=[
            metrics[name] for name in ("preflight/matmul_tflops", "preflight/matmul_slowest_tflops") if metrics
        ],
        across_gb_per_s=metrics.get("preflight/all_reduce_gb_per_s") if len(set(nodes)) > 1 else None,
        inside_gb_per_s=inside_gb_per_s,
        seen_after_s=seen_after_s,
        clock_s=clock_s,
    )


def _seen_after_s(world: World, nodes: list[str], folder: Path) -> dict[str, float | None]:
    """Return how long each node takes to see a file of the first node and one of the last, the longer of the two."""
    longest_s = 0.0
    for writer in sorted({0, world.size - 1}):
        mark = folder / f"seen-{writer}"
        if world.rank == writer:
            write_text(mark, "")
        world.barrier()
        longest_s = max(longest_s, _seconds_until(mark))
    return {
        node: seconds if math.isfinite(seconds) else None
        for node, seconds in _worst(nodes, world.gather(longest_s)).items()  # type: ignore[arg-type]
    }


def _seconds_until(path: Path) -> float:
    """Return the seconds until a file exists; infinity if it never does."""
    start_s = time.perf_counter()
    while not path.exists():
        if time.perf_counter() - start_s > _SEE_S:
            return math.inf
        time.sleep(0.01)
    return time.perf_counter() - start_s


def _worst(nodes: list[str], values: list[float]) -> dict[str, float]:
    """Return the largest of the values of each node's ranks."""
    worst: dict[str, float] = {}
    for node, value in zip(nodes, values, strict=True):
        worst[node] = max(value, worst.get(node, value))
    return worst


def _clock_s(world: World, nodes: list[str]) -> dict[str, float]:
    """Return how far each node's clock is ahead: the median of some readings that follow a barrier."""
    readings: list[list[float]] = []
    for _ in range(_NUM_CLOCK_READINGS):
        world.barrier()
        readings.append(world.gather(time.time()))  # type: ignore[arg-type]
    ahead = [statistics.median(look[rank] - look[0] for look in readings) for rank in range(world.size)]
    return {node: ahead[nodes.index(node)] for node in dict.fromkeys(nodes)}


def _inside_gb_per_s(world: World, nodes: list[str]) -> tuple[dict[str, float], str | None]:
    """Return the all-reduce speed within each node, and the problem if one is wrong. Nodes of one rank are left out."""
    own = None
    for node in dict.fromkeys(nodes):
        ranks = [rank for rank, where in enumerate(nodes) if where == node]
        group = dist.new_group(ranks)  # by all ranks, members or not
        if world.rank in ranks and len(ranks) > 1:
            own = group
    speed, is_right = (None, True) if own is None else all_reduce_speed(world.device, own)
    found: list[tuple[float | None, bool]] = world.gather((speed, is_right))  # type: ignore[assignment]
    speeds = {node: speed for node, (speed, _) in zip(nodes, found, strict=True) if speed is not None}
    wrong = sorted({node for node, (_, is_right) in zip(nodes, found, strict=True) if not is_right})
    return speeds, f"an all-reduce inside of {', '.join(wrong)} gave a wrong sum: exclude it" if wrong else None
