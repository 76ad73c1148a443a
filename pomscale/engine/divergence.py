"""Is a step to be kept, left out, or is it time to go back? Pure logic on numbers that are the same on every rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pomscale.base.errors import PomscaleError
from pomscale.config.engine import FaultsConfig

Verdict = Literal["ok", "skip", "rollback"]

_MAD_TO_SIGMA = 1.4826  # of a normal distribution, where both measure the same
# A loss within z_score hundredths of the median is no spike, however still the losses before it were: they are as good
# as constant where batches are large or samples are few.
_LEAST_SIGMA = 0.01


class Divergence:
    """Judges each step by its loss and gradient norm. state: of `dump`, from the checkpoint that a run goes on from.

    skip: loss or norm is not finite. rollback: that for the `max_non_finite`-th time in a row, or a loss spike: more
    than `z_score` robust standard deviations (1.4826 MAD) above the median of the last `num_steps` good losses, once
    there are so many.
    """

    def __init__(self, faults: FaultsConfig, state: Mapping[str, Any] | None = None) -> None:
        self._faults = faults
        window = faults.loss_spike.num_steps if faults.loss_spike else 0
        state = state or {"good": [], "num_in_a_row": 0, "num_rollbacks": 0, "num_skipped": 0}
        self._good: deque[float] = deque(state["good"], maxlen=window)
        self._num_in_a_row: int = state["num_in_a_row"]
        self.num_rollbacks: int = state["num_rollbacks"]  # of the run so far
        self.num_skipped: int = state["num_skipped"]  # steps of the run so far
        self.reason = ""  # of the last verdict that was not "ok"

    def dump(self) -> dict[str, Any]:
        """For a checkpoint: a run that is requeued judges as one that is not."""
        return {
            "good": list(self._good),
            "num_in_a_row": self._num_in_a_row,
            "num_rollbacks": self.num_rollbacks,
            "num_skipped": self.num_skipped,
        }

    def assess(self, loss: float, norm: float) -> Verdict:
        """Of one step. Call it once per step."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.reason = f"loss {loss:g} and gradient norm {norm:g}: not finite"
            self.num_skipped += 1
            self._num_in_a_row += 1
            return "skip" if self._num_in_a_row < self._faults.max_non_finite else "rollback"
        self._num_in_a_row = 0
        if self._is_spike(loss):
            return "rollback"
        self._good.append(loss)
        return "ok"

    def _is_spike(self, loss: float) -> bool:
        spike = self._faults.loss_spike
        if spike is None or len(self._good) < spike.num_steps:
            return False
        median = statistics.median(self._good)
        deviation = statistics.median([abs(good - median) for good in self._good])
        z_score = (loss - median) / max(_MAD_TO_SIGMA * deviation, _LEAST_SIGMA * abs(median), 1e-12)
        if z_score <= spike.z_score:
            return False
        self.reason = f"loss {loss:g} is {z_score:.1f} robust standard deviations above its median {median:g}"
        return True

    def rolled_back(self) -> None:
        """The run is at its last checkpoint again: forget what came after it."""
        self._good.clear()
        self._num_in_a_row = 0
        self.num_rollbacks += 1

    @property
    def may_roll_back(self) -> bool:
        return self.num_rollbacks < self._faults.max_rollbacks

    def give_up(self, first: int, end: int, has_checkpoint: bool) -> PomscaleError:
        """The end of the run, at global positions `first` to `end` - 1, where a rollback is due and cannot be."""
        why = (
            f"the run has gone back {self.num_rollbacks} times already (faults.max_rollbacks)"
            if has_checkpoint
            else "there is no checkpoint to go back to"
        )
        return PomscaleError(
            f"{self.reason}, at global positions {first} to {end - 1}, and {why}. Check the data (pomscale data "
            "verify), lower optimizer.lr, or train in fp32, then run the same command again"
        )
