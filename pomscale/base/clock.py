"""How far a run is: the clock of everything, and where it is in its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """samples: seen by the optimiser; learning rate, averages, saves and evaluation go by it.

    position: the global position (data.order) at which the next step begins. They part where steps are left out.
    skipped: ranges [first, end) of positions that no optimiser step of this run counts.
    """

    samples: int = 0
    position: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)

    def take(self, batch: int) -> None:
        """The optimiser has seen the step at `position`."""
        self.samples += batch
        self.position += batch

    def leave_out(self, batch: int) -> None:
        """The step at `position` was not taken."""
        self._skip(self.position, self.position + batch)
        self.position += batch

    def go_back(self, then: Clock) -> None:
        """To an earlier state of the run, but not to its data: what came since is left out."""
        now = self.position
        self.samples, self.skipped = then.samples, list(then.skipped)
        self._skip(then.position, now)

    def _skip(self, first: int, end: int) -> None:
        if self.skipped and self.skipped[-1][1] == first:
            first = self.skipped.pop()[0]
        if first < end:
            self.skipped.append((first, end))

    def dump(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "samples": self.samples,
            "position": self.position,
            "skipped": [list(pair) for pair in self.skipped],
        }

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Clock:
        """The clock of a checkpoint, from its meta."""
        return cls(meta["samples"], meta["position"], [(first, end) for first, end in meta["skipped"]])
