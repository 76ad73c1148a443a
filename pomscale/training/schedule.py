"""Schedule of a run: what depends on the number of samples that the optimiser has seen."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.engine import EmaConfig, ScheduleConfig
from pomscale.config.train import TrainRecipe
from pomscale.engine.averages import ema_weights
from pomscale.engine.optimizers import learning_rate


@dataclass(frozen=True)
class Schedule:
    """Learning rate, decay of the averages, the end of the run, and when periodic work is due."""

    total_samples: int
    global_batch: int
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

    def is_due(self, every_samples: int, samples: int) -> bool:
        """Return whether the step that ended at `samples` reached or passed a multiple of `every_samples`."""
        return samples // every_samples > (samples - self.global_batch) // every_samples

    def learning_rate_from(self, samples: int) -> float:
        """Learning rate of the step that begins at `samples`."""
        # In the middle of the step: at its start a warm-up would give 0, at its end a cooldown would.
        return self._learning_rate(samples + self.global_batch // 2)

    def learning_rate_to(self, samples: int) -> float:
        """Learning rate of the step that ended at `samples`."""
        return self._learning_rate(max(0, samples - self.global_batch // 2))

    def _learning_rate(self, samples: int) -> float:
        return learning_rate(self.shape, self.peak, samples, self.total_samples)

    def ema_weights_from(self, samples: int) -> dict[str, float]:
        """Share of the new weights in each average, for the step that begins at `samples`."""
        return ema_weights(self.ema, samples + self.global_batch, self.global_batch)
