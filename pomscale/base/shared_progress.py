"""Progress of work that several processes share part by part: one line for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pomscale.base.console import Progress

_LOOK_EVERY_S = 5.0


def is_first_here() -> bool:
    """Return whether this is the first process of its job on this machine, which speaks for the others."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


class SharedProgress(Progress):
    """Progress of all processes that share a work, shown by the first of each machine.

    Done are the items of parts that are recorded, whoever made them, and those of this process's part at hand. The rate
    is that of the parts that were recorded since the block began. Before another process has recorded one, the others
    are taken to be as fast as this one.
    """

    def __init__(
        self,
        label: str,
        total: int,
        recorded: Callable[[], int],
        num_processes: int,
        *,
        enabled: bool = True,
        every_s: float = 30.0,
    ) -> None:
        """Prepare to show progress.

        Args:
            label: What is made, in the plural ("pictures").
            total: Number of items of the whole work.
            recorded: Counts the items of all parts that are recorded now.
            num_processes: Number of processes that share the work, this one included.
            enabled: False shows nothing, and still counts.
            every_s: Seconds between two lines in a log, beside the first and the last one.
        """
        super().__init__(label, total, enabled=enabled and is_first_here(), every_s=every_s)
        self._count_recorded, self._num_processes = recorded, num_processes
        self._num_before = self._num_recorded = self.num_done = recorded()
        self._num_own = self._num_at_hand = 0
        self._looked_s = self._grown_s = self._begun_s

    def advance(self, amount: int = 1) -> None:
        """Count items of the part at hand."""
        self._num_own += amount
        self._num_at_hand += amount
        if time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self._look()
        self._count()

    def end_part(self) -> None:
        """Say that the part at hand is recorded, or was not this process's to make."""
        self._num_at_hand = 0
        self._look()
        self._count()

    @property
    def rate_per_s(self) -> float:
        """Items per second of all processes since the block began."""
        num_new = self._num_recorded - self._num_before
        if num_new > self._num_own - self._num_at_hand:
            return num_new / max(self._grown_s - self._begun_s, 1e-9)
        return self._num_own * self._num_processes / self.elapsed_s

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        found = self._count_recorded()
        if found > self._num_recorded:
            self._num_recorded, self._grown_s = found, self._looked_s

    def _count(self) -> None:
        # A part may be recorded by another process, and its items be counted twice until this one's part ends.
        self.num_done = min(self._num_recorded + self._num_at_hand, self._total)
        self._show()
