"""This process of a run: the other ranks, its start of the run, requests to stop, and the watchdog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pomscale.base.console import warn
from pomscale.base.errors import PomscaleError
from pomscale.distributed.stop import StopRequest
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World
from pomscale.runs.starts import Start, Superseded


@dataclass
class Process:
    """One rank of one start of a run. `after_first_step` is called once, when this process has done its first step."""

    world: World
    start: Start
    stop: StopRequest
    watchdog: Watchdog
    after_first_step: Callable[[], None] = lambda: None
    _has_done_a_step: bool = field(default=False, init=False)

    def any_rank_asked_to_stop(self) -> bool:
        """Return whether any rank has received a request to stop. A collective."""
        (votes,) = self.world.sum([float(self.stop.requested)])
        return votes > 0

    def step_done(self) -> None:
        """Tell the watchdog that a step is done."""
        self.watchdog.beat()
        if not self._has_done_a_step:
            self._has_done_a_step = True
            self.after_first_step()

    def check_start(self) -> None:
        """Raise Superseded on rank 0 if a newer start of the run has taken over.

        A file system that cannot be read for a moment is only warned of: everything that is committed is checked again.
        """
        if self.world.is_main:
            try:
                self.start.check()
            except Superseded:
                raise
            except PomscaleError as problem:
                warn(str(problem))

    def warn(self, message: str) -> None:
        """Warn once for all ranks."""
        if self.world.is_main:
            warn(message)
