"""Run one piece of work per shard in processes, with a progress bar that counts bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pomscale.base.console import Progress
from pomscale.base.errors import PomscaleError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Reading fewer bytes takes less time than the start of a process.
_BYTES_PER_PROCESS = 1 << 27


def default_num_workers() -> int:
    """Return the number of cores that this process may use, which under a batch system may not be all."""
    return len(os.sched_getaffinity(0))


def over_shards(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    num_bytes: Sequence[int],
    *,
    label: str,
    num_workers: int | None,
    progress: bool,
) -> Iterator[Result]:
    """Yield work(task) of every task, in order.

    Processes are used and not threads, since small records are more headers than hashes, for which two threads take 1.7
    times as long as one. Work, tasks and results are pickled, `work` once per process, and a script that calls this
    needs the `__main__` guard of multiprocessing. Errors of `work` are raised here; PomscaleError if a process dies.

    Args:
        work: Function of a task.
        tasks: The tasks.
        num_bytes: Bytes that each task reads, for bar and ETA.
        label: Name of the work on the bar.
        num_workers: Number of processes; None for as many as there are cores and the data is worth.
        progress: Show the bar.
    """
    if num_workers is None:
        num_workers = min(default_num_workers(), 1 + sum(num_bytes) // _BYTES_PER_PROCESS)
    with Progress(label, sum(num_bytes), unit="bytes", enabled=progress, every_s=10.0) as bar:
        results = map(work, tasks) if num_workers == 1 else _in_processes(work, tasks, min(num_workers, len(tasks)))
        for result, size in zip(results, num_bytes, strict=True):
            bar.advance(size)
            yield result


def _in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    # Not forked, since this process may have threads, and a fork copies the locks that they hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(num_workers, 1), context, _start, (work,))
    try:
        yield from pool.map(_do, tasks)
    except BrokenProcessPool as error:
        raise PomscaleError("a worker process died, perhaps for want of memory; use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any]) -> None:
    global _work  # noqa: PLW0603  (the purpose of a pool's initializer)
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers


def _do(task: Any) -> Any:
    return _work(task)
