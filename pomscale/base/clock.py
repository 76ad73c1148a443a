"""Clock of a run: samples seen by the optimiser, and the position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Samples seen and position in the data; the two differ once steps were left out.

    Attributes:
        samples: samples seen by the optimiser; learning rate, averages, saves and evaluation depend on it.
        position: global position (data.order) at which the next step begins.
        skipped: ranges [first, end) of positions that no optimiser step of this run counts.
        last_step: samples of the last step, where steps differ; None = they do not, or there was none.
    """

    samples: int = 0
    position: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)
    last_step: int | None = None

    def take(self, batch: int, *, steps_differ: bool = False) -> None:
        """Count a step of the optimiser on the `batch` samples at `position`."""
        self.last_step = batch if steps_differ else None
        self.samples += batch
        self.position += batch

    def leave_out(self, batch: int) -> None:
        """Leave out the `batch` samples at `position`: no step was taken."""
        self._skip(self.position, self.position + batch)
        self.position += batch

    def go_back(self, then: Clock) -> None:
        """Go back to an earlier state of the run but not in its data: the positions since then are left out."""
        now = self.position
        self.samples, self.skipped, self.last_step = then.samples, list(then.skipped), then.last_step
        self._skip(then.position, now)

    def _skip(self, first: int, end: int) -> None:
        if self.skipped and self.skipped[-1][1] == first:
            first = self.skipped.pop()[0]
        if first < end:
            self.skipped.append((first, end))

    def dump(self) -> dict[str, Any]:
        """Return the clock as JSON for a checkpoint; see `of`."""
        return {
            "samples": self.samples,
            "position": self.position,
            "skipped": [list(pair) for pair in self.skipped],
            **({} if self.last_step is None else {"last_step": self.last_step}),
        }

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Clock:
        """Return the clock of a checkpoint, from its meta."""
        skipped = [(first, end) for first, end in meta["skipped"]]
        return cls(meta["samples"], meta["position"], skipped, meta.get("last_step"))
