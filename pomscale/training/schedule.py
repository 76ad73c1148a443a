"""Schedule of a run: what depends on the number of samples that the optimiser has seen."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.base.clock import Clock
from pomscale.config.engine import EmaConfig, ScheduleConfig
from pomscale.config.train import TrainRecipe
from pomscale.engine.averages import ema_weights
from pomscale.engine.optimizers import learning_rate


@dataclass(frozen=True)
class Schedule:
    """Learning rate, decay of the averages, the end of the run, and when periodic work is due.

    global_batch: samples of every step; None = packed steps, whose numbers of samples differ.
    """

    total_samples: int
    global_batch: int | None
    peak: float  # highest learning rate
    shape: ScheduleConfig
    ema: EmaConfig

    @classmethod
    def of(cls, recipe: TrainRecipe) -> Schedule:
        training = recipe.training
        return cls(training.total_samples, training.global_batch, recipe.optimizer.lr, recipe.schedule, recipe.ema)

    def is_over(self, samples: int) -> bool:
        """Return whether all samples of the run have been seen."""
        return samples >= self.total_samples

    @property
    def steps_differ(self) -> bool:
        """Whether steps have different numbers of samples."""
        return self.global_batch is None

    def left(self, samples: int) -> int:
        """Return how many samples are left of the run."""
        return self.total_samples - samples

    def is_due(self, every_samples: int, clock: Clock) -> bool:
        """Return whether the step that ended at `clock` reached or passed a multiple of `every_samples`."""
        return clock.samples // every_samples > (clock.samples - self._last_step(clock)) // every_samples

    def _last_step(self, clock: Clock) -> int:
        """Samples of the step that ended at `clock`; 0 before the first packed step."""
        return (clock.last_step or 0) if self.global_batch is None else self.global_batch

    def learning_rate_from(self, samples: int, step: int) -> float:
        """Learning rate of the step of so many samples that begins at `samples`."""
        # In the middle of the step: at its start a warm-up would give 0, at its end a cooldown would.
        return self._learning_rate(samples + step // 2)

    def learning_rate_to(self, clock: Clock) -> float:
        """Learning rate of the step that ended at `clock`."""
        return self._learning_rate(max(0, clock.samples - self._last_step(clock) // 2))

    def _learning_rate(self, samples: int) -> float:
        return learning_rate(self.shape, self.peak, samples, self.total_samples)

    def ema_weights_from(self, samples: int, step: int) -> dict[str, float]:
        """Share of the new weights in each average, for the step of so many samples that begins at `samples`."""
        return ema_weights(self.ema, samples + step, step)
