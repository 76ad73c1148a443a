"""The training loop. build.py makes a Trainer from a recipe, run.py calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pomscale.base.clock import Clock
from pomscale.engine.protocol import Engine
from pomscale.training.periodic import PeriodicWork
from pomscale.training.process import Process
from pomscale.training.recovery import Recovery, StepOutcome
from pomscale.training.saving import Saver
from pomscale.training.schedule import Schedule
from pomscale.training.step import TrainStep
from pomscale.training.telemetry import Telemetry


@dataclass(frozen=True)
class Trainer:
    """The parts of training, and the order in which they act. Everything is scheduled in samples seen."""

    engine: Engine
    steps: Iterator[TrainStep]
    # A micro-batch's share of the mean loss over the step; or of the loss and its parts, see `share_of_loss`.
    loss: Callable[[nn.Module, Any], Tensor]
    schedule: Schedule
    saver: Saver
    recovery: Recovery
    telemetry: Telemetry
    periodic: PeriodicWork
    process: Process

    def run(self, clock: Clock) -> None:
        """Train from `clock` to the end of the run, or until a stop is requested, and save.

        clock: moves on with the training. Errors are raised once the save under way is complete.
        """
        try:
            stopped = self._train(clock, stopping=self._begin(clock))
            self._finish(clock, stopped)
        except Exception:
            self.saver.finish_after_error()
            raise

    def _train(self, clock: Clock, stopping: bool) -> bool:
        """The loop. Returns whether a stop was requested before the end."""
        while not stopping and not self.schedule.is_over(clock.samples):
            outcome, stopping = self._step(clock)
            taken = outcome is StepOutcome.TAKEN
            last = stopping or self.schedule.is_over(clock.samples)
            if last or (taken and self.schedule.is_due(self.telemetry.every_samples, clock)):
                self.telemetry.log(clock)
            with self.telemetry.timer.paused():
                if taken:
                    self.periodic.check_replicas(clock)
                self.saver.poll(clock.samples)
                if taken or last:
                    self.saver.save_checkpoint(clock, last=last)
                if taken:
                    self.saver.save_snapshot(clock)
                # After the save, so that what fails in the events costs no training. A run that is asked to stop has
                # seconds left: the next start runs its events.
                if taken and not stopping:
                    self.periodic.run_events(clock)
        return stopping

    def _begin(self, clock: Clock) -> bool:
        """Do what belongs to the checkpoint that the run continues from. Returns whether a stop was requested."""
        self.saver.begin_at(clock.samples)
        # After a signal during the start-up there is nothing to save, and no time to lose on a first step. At the end
        # of the run only the events are left, without which it would not be complete.
        stopping = not self.schedule.is_over(clock.samples) and self.process.any_rank_asked_to_stop()
        if clock.samples and not stopping:  # a stop or a kill may have come between the checkpoint and these
            self.saver.save_snapshot(clock)
            self.periodic.run_events(clock)
        return stopping

    def _step(self, clock: Clock) -> tuple[StepOutcome, bool]:
        """Take one step. Returns what became of it, and whether a stop was requested."""
        whole = self.telemetry.next_batch(self.steps, clock.samples)
        step = whole.first(self.schedule.left(clock.samples))
        share = self.engine.forward_backward(step.micro_batches, self.loss)
        bad = [sample for batch in step.micro_batches for sample in batch.bad]
        # One collective per step carries the loss, the ranks' agreement to stop, and word of bad samples. It waits for
        # the device, so it comes before the optimiser, on which the device works while the host begins the next step.
        stop_votes, num_bad, *losses = self.process.world.sum(
            [float(self.process.stop.requested), float(len(bad)), *share.view(-1)]
        )
        norm = self.engine.step(
            self.schedule.learning_rate_from(clock.samples, step.num_samples),
            self.schedule.ema_weights_from(clock.samples, step.num_samples),
        )
        if num_bad:
            self.recovery.note_bad_samples(clock.samples, bad)
        # The diffusion loss is judged, which does not jump when alignment ends. If the other is not finite, neither is
        # the norm.
        loss, alignment = (losses[0], None) if len(losses) == 1 else (losses[1], _mean(*losses[2:]))
        verdict = self.recovery.assess(clock.samples, loss, norm)
        self.telemetry.charge_step()
        self.process.step_done()
        # The next step begins where the whole one ends, also where this one was cut at the end of the run and left out.
        outcome = self.recovery.carry_out(verdict, clock, norm, whole.num_samples)
        if outcome is StepOutcome.TAKEN:
            clock.take(step.num_samples, steps_differ=self.schedule.steps_differ)
            self.telemetry.count_step(loss, norm, step.num_samples, alignment)
        return outcome, stop_votes > 0 and not self.schedule.is_over(clock.samples)

    def _finish(self, clock: Clock, stopped: bool) -> None:
        ledger = self.telemetry.records.ledger
        if stopped:
            ledger.event("stop_requested", clock.samples, signal=self.process.stop.signal_name or "at another rank")
        self.telemetry.profiler.close()
        self.saver.finish(clock.samples)
        ledger.write(clock.samples)


def _mean(total: float, share: float) -> float | None:
    """Return the mean over a share of the samples, whose sum over the step is `total`; None = of none."""
    return total / share if share else None
