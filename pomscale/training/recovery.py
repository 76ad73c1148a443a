"""Recovery from bad steps and bad samples: skip a step, or roll back to a checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from pomscale.base.clock import Clock
from pomscale.engine.divergence import Divergence, Verdict
from pomscale.training.process import Process
from pomscale.training.saving import Saver
from pomscale.training.telemetry import Records, Telemetry


class StepOutcome(Enum):
    """Outcome of a step, the same on every rank."""

    TAKEN = "taken"  # the optimiser has stepped, and the clock has moved on
    SKIPPED = "skipped"  # loss or gradient was not finite: nothing has changed but the position in the data
    ROLLED_BACK = "rolled back"  # the state is that of the last checkpoint, at a position behind this step


class BadSamples(Protocol):
    """Samples that this run could not read and left out; see data.bad_samples. The same on every rank."""

    def __len__(self) -> int: ...

    @property
    def known(self) -> list[tuple[str, int]]: ...

    def add(self, samples: int, met: Iterable[Any]) -> None: ...


@dataclass
class Recovery:
    """Judges each step, and carries out the verdict. restore: fills the engine from a checkpoint; returns its meta."""

    divergence: Divergence
    bad_samples: BadSamples
    restore: Callable[[Path], dict[str, Any]]
    saver: Saver
    telemetry: Telemetry
    process: Process
    records: Records

    def note_bad_samples(self, samples: int, bad: list[Any]) -> None:
        """Add this rank's bad samples to the list that all ranks share. A collective.

        Raises PomscaleError, on all ranks, if there are more than the recipe allows.
        """
        met: list[Any] = self.process.world.gather(bad)
        self.bad_samples.add(samples, itertools.chain.from_iterable(met))

    def assess(self, samples: int, loss: float, norm: float) -> Verdict:
        """Return the verdict on the step that began at `samples`. Call it before the step's time is charged."""
        verdict = self.divergence.assess(loss, norm)
        if verdict != "ok":
            # Otherwise the time of this step would be counted with that of the good steps before it.
            self.records.ledger.write(samples)
        return verdict

    def carry_out(self, verdict: Verdict, clock: Clock, norm: float, step: int) -> StepOutcome:
        """Skip the step of so many samples at `clock` or roll back from it, as the verdict says. A collective.

        The clock is moved past what is left out; a step that is taken is left to the caller to count.
        """
        if verdict == "rollback" and self._roll_back(clock, norm, step):
            return StepOutcome.ROLLED_BACK
        if math.isfinite(norm):
            return StepOutcome.TAKEN
        self._skip(clock, step)
        return StepOutcome.SKIPPED

    def _skip(self, clock: Clock, step: int) -> None:
        reason = self.divergence.reason
        self.process.warn(f"the step at position {clock.position:,} is left out: {reason}")
        self.records.ledger.event("skipped_step", clock.samples, position=clock.position, reason=reason)
        self.records.alerts.left_out(clock.samples, reason)
        clock.leave_out(step)

    def _roll_back(self, clock: Clock, norm: float, step: int) -> bool:
        """Restore the last checkpoint, and continue with the data after the current position.

        So the samples and the noise that diverged are not used again. Returns False, and has done nothing, where a loss
        spikes before there is a checkpoint: the step counts then.
        """
        with self.telemetry.timer.paused(), self.process.watchdog.slow("going back to a checkpoint"):
            latest = self.saver.newest(clock.samples)
            if latest is None and math.isfinite(norm):
                self.process.warn(
                    f"{self.divergence.reason}, and there is no checkpoint to go back to: the step counts"
                )
                return False
            first = clock.position
            clock.leave_out(step)
            if latest is None or not self.divergence.may_roll_back:
                raise self.divergence.give_up(first, clock.position, latest is not None)
            self._restore(latest, clock)
        self.telemetry.discard_steps()
        self.records.ledger.charge("rollback")
        self.records.monitor.log(clock.samples, {"faults/rollbacks": self.divergence.num_rollbacks})
        return True

    def _restore(self, checkpoint: Path, clock: Clock) -> None:
        reason = self.divergence.reason
        then = Clock.of(self.restore(checkpoint))
        self.process.warn(f"back to {checkpoint}, to continue at position {clock.position:,}: {reason}")
        self.records.ledger.event("rollback", clock.samples, to_samples=then.samples, reason=reason)
        self.records.alerts.went_back(clock.samples, then.samples, reason)
        clock.go_back(then)
        self.divergence.rolled_back()
        self.saver.begin_at(clock.samples)
