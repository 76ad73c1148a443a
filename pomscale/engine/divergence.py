"""Decision whether a step is taken, left out or rolled back: pure logic on numbers that all ranks share."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pomscale.base.errors import PomscaleError
from pomscale.config.engine import FaultsConfig

Verdict = Literal["ok", "skip", "rollback"]

_MAD_TO_SIGMA = 1.4826  # ratio of both for a normal distribution
# Share of the median. A loss within z_score hundredths of the median is no spike, even if the losses before it hardly
# differed, as they do where batches are large or samples are few.
_LEAST_SIGMA = 0.01


class Divergence:
    """Detector of steps that diverge, by their loss and gradient norm.

    "skip": loss or norm is not finite. "rollback": the same for the `max_non_finite`-th time in a row, or a loss spike,
    that is, a loss more than `z_score` robust standard deviations (1.4826 MAD) above the median of the last `num_steps`
    good losses, once there are so many.
    """

    def __init__(self, faults: FaultsConfig, state: Mapping[str, Any] | None = None) -> None:
        """Start from the state that `dump` returned for the checkpoint of a resumed run, or from none."""
        self._faults = faults
        window = faults.loss_spike.num_steps if faults.loss_spike else 0
        state = state or {"good": [], "num_in_a_row": 0, "num_rollbacks": 0, "num_skipped": 0}
        self._good: deque[float] = deque(state["good"], maxlen=window)
        self._num_in_a_row: int = state["num_in_a_row"]
        self.num_rollbacks: int = state["num_rollbacks"]  # of the run so far
        self.num_skipped: int = state["num_skipped"]  # steps of the run so far
        self.reason = ""  # of the last verdict that was not "ok"

    def dump(self) -> dict[str, Any]:
        """Return the state as JSON for a checkpoint, so that a resumed run decides as one that was never stopped."""
        return {
            "good": list(self._good),
            "num_in_a_row": self._num_in_a_row,
            "num_rollbacks": self.num_rollbacks,
            "num_skipped": self.num_skipped,
        }

    def assess(self, loss: float, norm: float) -> Verdict:
        """Decide on one step. Call it once per step."""
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
        """Forget the losses since the last checkpoint, which the run has gone back to."""
        self._good.clear()
        self._num_in_a_row = 0
        self.num_rollbacks += 1

    @property
    def may_roll_back(self) -> bool:
        """Whether the recipe allows one more rollback."""
        return self.num_rollbacks < self._faults.max_rollbacks

    def give_up(self, first: int, end: int, has_checkpoint: bool) -> PomscaleError:
        """Return the error that ends the run at positions `first` to `end` - 1, where a rollback is impossible."""
        why = (
            f"the run has gone back {self.num_rollbacks} times already (faults.max_rollbacks)"
            if has_checkpoint
            else "there is no checkpoint to go back to"
        )
        return PomscaleError(
            f"{self.reason}, at global positions {first} to {end - 1}, and {why}. Check the data (pomscale data "
            "verify), lower optimizer.lr, or train in fp32, then run the same command again"
        )
