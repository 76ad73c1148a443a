"""One piece of work per shard, in processes of their own, and a bar that shows bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pomscale.base.errors import PomscaleError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Less than this is read sooner than a process starts.
_BYTES_PER_PROCESS = 1 << 27
_LINE_EVERY_S = 10.0


def default_num_workers() -> int:
    """The cores that this process may use; a batch system may have given it less than the machine has."""
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
    """work(task) of every task, in order. `num_bytes`: what each task reads, for bar and ETA.

    Processes and not threads: small records are more headers than hashes, and at those two threads take longer than one
    (measured: 1.7 times). num_workers None: as many as there are cores and the data is worth. Work, tasks and results
    are pickled; `work` once per process; a script that calls this needs the `__main__` guard of multiprocessing. Errors
    of `work` are raised here; PomscaleError if a process dies.
    """
    if num_workers is None:
        num_workers = min(default_num_workers(), 1 + sum(num_bytes) // _BYTES_PER_PROCESS)
    with _Bar(label, sum(num_bytes), progress) as bar:
        results = map(work, tasks) if num_workers == 1 else _in_processes(work, tasks, min(num_workers, len(tasks)))
        for result, size in zip(results, num_bytes, strict=True):
            bar.advance(size)
            yield result


def _in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    # Not by fork: this process may have threads, and a fork copies the locks that they hold.
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
    global _work  # noqa: PLW0603  (what a pool's initializer is for)
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers


def _do(task: Any) -> Any:
    return _work(task)


class _Bar:
    """On a terminal a bar, in a log a line now and then; on stderr."""

    def __init__(self, label: str, num_bytes: int, enabled: bool) -> None:
        self._label = label
        self._num_bytes = num_bytes
        self._num_done = 0
        self._start = self._last_line = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not enabled or self._lines)
        self._task = self._bar.add_task(label, total=num_bytes, status="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        self._num_done += num_bytes
        self._bar.update(self._task, completed=self._num_done, status=self._status())
        if self._lines and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"{self._label}: {self._status()}", file=sys.stderr)

    def _status(self) -> str:
        rate = self._num_done / max(time.monotonic() - self._start, 1e-9)
        eta = timedelta(seconds=round((self._num_bytes - self._num_done) / rate)) if rate else "?"
        return f"{self._num_done / 1e9:,.2f} of {self._num_bytes / 1e9:,.2f} GB, {rate / 1e9:.2f} GB/s, ETA {eta}"
