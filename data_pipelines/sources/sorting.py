"""Sorting what may not fit in memory."""

from __future__ import annotations

import heapq
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator

_RUN_LENGTH = 100_000


def sorted_on_disk(names: Iterable[str], run_length: int = _RUN_LENGTH) -> Iterator[str]:
    """Names in sorted order, at most `run_length` of them in memory: more go through temporary files, in runs.

    `names` is read to its end at once.
    """
    names = iter(names)
    run = sorted(itertools.islice(names, run_length))
    files = []
    while len(run) == run_length:
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the merge
        file.writelines(f"{json.dumps(name)}\n" for name in run)
        file.seek(0)
        files.append(file)
        run = sorted(itertools.islice(names, run_length))
    return heapq.merge(run, *(map(json.loads, file) for file in files))
