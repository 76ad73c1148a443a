"""The training loop, and nothing else. Everything it uses is built in train.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pomscale.base.clock import Clock
from pomscale.base.console import warn
from pomscale.distributed.consistency import check_replicas
from pomscale.distributed.stop import StopRequest
from pomscale.distributed.stragglers import Stragglers
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World
from pomscale.engine.divergence import Divergence
from pomscale.engine.protocol import Engine
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.monitor import Monitor
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import StepTimer
from pomscale.runs.ledger import Ledger


class Saved(Protocol):
    """A save that is complete: how long it took in all, and how long training stood still for it."""

    @property
    def stall_s(self) -> float: ...
    @property
    def total_s(self) -> float: ...


class Store(Protocol):
    """What the loop asks of a checkpoint store; see checkpoint.store."""

    @property
    def damaged(self) -> Sequence[Any]: ...
    def save(self, samples: int, state: dict[str, Any], meta: dict[str, Any]) -> float: ...
    def poll(self) -> Saved | None: ...
    def wait(self) -> Saved | None: ...
    def newest(self) -> Path | None: ...
    def record_metrics(self, samples: int, metrics: Mapping[str, float | str]) -> None: ...
    def forget_after(self, samples: int) -> None: ...


class BadSamples(Protocol):
    """The samples that this run went on without; see data.bad_samples. The same on every rank."""

    def __len__(self) -> int: ...

    @property
    def known(self) -> list[tuple[str, int]]: ...

    def add(self, samples: int, met: Iterable[Any]) -> None: ...


@dataclass(frozen=True)
class Event:
    """Something that happens every so many samples, and at the end: validation, a grid of pictures.

    `run(samples)` is a collective, computes with the averaged weights, and returns metrics to log.
    """

    what: str
    every_samples: int
    run: Callable[[int], dict[str, float | str]]


@dataclass(frozen=True)
class Saving:
    """A store, how often it gets something, and which part of the engine's state that is.

    `holds(samples)`: a collective: is that of this moment there? Else it is saved.
    """

    store: Store
    every_samples: int
    part: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state
    holds: Callable[[int], bool] = lambda samples: False


@dataclass
class Trainer:
    """See train.py for what is passed in. The clock of everything is samples seen."""

    engine: Engine
    batches: Iterator[list[Any]]  # the micro-batches of this rank, one list per step; `bad`: those it could not read
    loss: Callable[[nn.Module, Any], Tensor]
    learning_rate: Callable[[int], float]
    ema_weights: Callable[[int], Mapping[str, float]]
    main_average: str
    checkpoints: Saving
    snapshots: Saving | None  # of averages, for `pomscale ema`
    checkpoint_meta: dict[str, Any]
    restore: Callable[[Path], dict[str, Any]]  # fills the engine from a checkpoint; gives its meta
    bad_samples: BadSamples
    epochs: Callable[[int], dict[str, float | str]]  # position -> how often each dataset was gone through, to log
    events: list[Event]
    monitor: Monitor
    ledger: Ledger
    alerts: Alerts
    host: HostStats
    mfu: Callable[[float], float] | None  # samples/s -> model FLOPs utilisation, where the device's peak is known
    profiler: ProfileWindow
    world: World
    stop: StopRequest
    watchdog: Watchdog
    divergence: Divergence
    stragglers: Stragglers
    still_ours: Callable[[], None]  # raises when a newer start of this run has taken over
    first_step_done: Callable[[], None]
    global_batch: int
    total_samples: int
    log_every_samples: int
    consistency_every_samples: int | None
    timer: StepTimer = field(default_factory=StepTimer)
    losses: list[float] = field(default_factory=list)  # since the last row of metrics
    norms: list[float] = field(default_factory=list)
    _saved_at: int = 0  # samples of the checkpoint that this process has written or loaded last
    _is_warm: bool = False  # after the first step of this process, which compiles and allocates

    def run(self, clock: Clock) -> None:
        """Train from `clock`, which goes on, to the end or to a stop that was asked for; all is saved then."""
        try:
            self._train(clock)
        except Exception:
            # Whatever has failed, here or (then it is torch's own error) at another rank: the save before it is good.
            with self.watchdog.slow("saving"):
                self.checkpoints.store.wait()
            raise

    def _train(self, clock: Clock) -> None:
        self._forget_what_was_given_up(clock.samples)
        # A signal during the start-up: there is nothing to save, and no time to lose on a first step. At the end only
        # the events are left, and without them the run would not be whole.
        stopping = clock.samples < self.total_samples and self._asked_to_stop()
        if clock.samples and not stopping:  # what belongs to the last save, and a stop or a kill may have cut off
            self._save_snapshot(clock)
            self._run_events(clock.samples)
        self._saved_at = clock.samples
        while clock.samples < self.total_samples and not stopping:
            taken, stopping = self._step(clock)
            last = stopping or clock.samples >= self.total_samples
            if last or (taken and self._due(self.log_every_samples, clock.samples)):
                self._log(clock)
            with self.timer.paused():
                if taken:
                    self._check_replicas(clock.samples)
                self._report(clock.samples, self.checkpoints.store.poll())
                if clock.samples != self._saved_at and (
                    last or (taken and self._due(self.checkpoints.every_samples, clock.samples))
                ):
                    self._save(clock, self.checkpoints)
                    self._saved_at = clock.samples
                if taken:
                    self._save_snapshot(clock)
                # After the save, so that what fails in them costs no training. A run that is asked to stop has
                # seconds left: its events happen after the restart.
                if taken and not stopping:
                    self._run_events(clock.samples)
        self._finish(clock, stopping)

    def _asked_to_stop(self) -> bool:
        """A collective."""
        (votes,) = self.world.sum([float(self.stop.requested)])
        return votes > 0

    def _step(self, clock: Clock) -> tuple[bool, bool]:
        """One global batch; returns whether the clock has moved on, and whether a stop was asked for."""
        self.ledger.charge("other")
        self.profiler.step(clock.samples)
        with self.timer.data_wait():
            micro_batches = next(self.batches)
        self.ledger.charge("data_wait")
        share = self.engine.forward_backward(micro_batches, self._loss)
        bad = [sample for batch in micro_batches for sample in batch.bad]
        # One collective per step carries the loss, the ranks' agreement to stop, and word of bad samples. It waits for
        # the device, so it comes before the optimiser, which the device works on while the host begins the next step.
        loss, stop_votes, num_bad = self.world.sum([share, float(self.stop.requested), float(len(bad))])
        # In the middle of the step: at its start a warm-up would give 0, at its end a cooldown would.
        learning_rate = self.learning_rate(clock.samples + self.global_batch // 2)
        norm = self.engine.step(learning_rate, self.ema_weights(clock.samples + self.global_batch))
        if num_bad:
            self._note_bad(clock.samples, bad)
        verdict = self.divergence.assess(loss, norm)
        if verdict != "ok":
            self.ledger.write(clock.samples)  # or this step's time would count with that of the good ones before it
        self.ledger.charge("step" if self._is_warm else "compile")
        self.watchdog.beat()
        if not self._is_warm:
            self._is_warm = True
            self.first_step_done()
        went_back = verdict == "rollback" and self._roll_back(clock, norm)
        taken = not went_back and math.isfinite(norm)
        if taken:
            clock.take(self.global_batch)
            self.losses.append(loss)
            self.norms.append(norm)
            self.timer.count_step(self.global_batch)
        elif not went_back:
            self._leave_out(clock)
        return taken, stop_votes > 0 and clock.samples < self.total_samples

    def _loss(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """A loss that is not finite gets a gradient that is not finite, even if only the loss has overflowed: so the
        engine leaves a step out where the verdict on it will be that.
        """
        loss = self.loss(model, micro_batch)
        return loss * (1 + 0 * loss.detach())  # 0 * inf is nan

    def _note_bad(self, samples: int, bad: list[Any]) -> None:
        """A collective: every rank hears of every bad sample, and all end the run together if there are too many."""
        met: list[Any] = self.world.gather(bad)
        self.bad_samples.add(samples, itertools.chain.from_iterable(met))

    def _leave_out(self, clock: Clock) -> None:
        self._warn(f"the step at position {clock.position:,} is left out: {self.divergence.reason}")
        self.ledger.event("skipped_step", clock.samples, position=clock.position, reason=self.divergence.reason)
        self.alerts.left_out(clock.samples, self.divergence.reason)
        clock.leave_out(self.global_batch)

    def _roll_back(self, clock: Clock, norm: float) -> bool:
        """To the last checkpoint, past the data since: its noise and its samples are not met again.

        Returns False, and has done nothing, where a loss spikes before there is a checkpoint: then the step counts.
        """
        with self.timer.paused(), self.watchdog.slow("going back to a checkpoint"):
            self.checkpoints.store.wait()
            num_damaged = len(self.checkpoints.store.damaged)
            latest = self.checkpoints.store.newest()
            for damaged in self.checkpoints.store.damaged[num_damaged:]:
                self.ledger.event("damaged_checkpoint", clock.samples, reason=damaged.reason)
            if latest is None and math.isfinite(norm):
                self._warn(f"{self.divergence.reason}, and no checkpoint to go back to: going on")
                return False
            first = clock.position
            clock.leave_out(self.global_batch)
            if latest is None or not self.divergence.may_roll_back:
                raise self.divergence.give_up(first, clock.position, latest is not None)
            then = Clock.of(self.restore(latest))
            self._warn(f"back to {latest}, and on past position {clock.position:,}: {self.divergence.reason}")
            self.ledger.event("rollback", clock.samples, to_samples=then.samples, reason=self.divergence.reason)
            self.alerts.went_back(clock.samples, then.samples, self.divergence.reason)
            clock.go_back(then)
            self._saved_at = clock.samples
            self.divergence.rolled_back()
            self._forget_what_was_given_up(clock.samples)
        self.losses, self.norms = [], []
        self.ledger.charge("rollback")
        self.monitor.log(clock.samples, {"faults/rollbacks": self.divergence.num_rollbacks})
        return True

    def _forget_what_was_given_up(self, samples: int) -> None:
        if self.snapshots is not None:
            self.snapshots.store.wait()
            self.snapshots.store.forget_after(samples)

    def _check_replicas(self, samples: int) -> None:
        every = self.consistency_every_samples
        if every is not None and self._due(every, samples):
            replicas = self.engine.replicas()
            if replicas is not None:
                check_replicas(self.world, replicas.group, replicas.tensors)

    def _save(self, clock: Clock, saving: Saving) -> None:
        meta = {
            **clock.dump(),
            "bad_samples": self.bad_samples.known,
            "divergence": self.divergence.dump(),
            **self.checkpoint_meta,
        }
        with self.watchdog.slow("saving"):
            saving.store.save(clock.samples, saving.part(self.engine.state_dict()), meta)
        self.ledger.charge("checkpoint_stall")

    def _save_snapshot(self, clock: Clock) -> None:
        """Every so many samples, and at the end: that is where most want an average to end."""
        snapshots, samples = self.snapshots, clock.samples
        if snapshots is None or not (samples >= self.total_samples or self._due(snapshots.every_samples, samples)):
            return
        if not snapshots.holds(samples):
            self._save(clock, snapshots)

    def _report(self, samples: int, saved: Saved | None) -> None:
        if saved is not None:
            metrics: dict[str, float | str] = {"checkpoint/stall_s": saved.stall_s, "checkpoint/total_s": saved.total_s}
            self.monitor.log(samples, metrics)

    def _run_events(self, samples: int) -> None:
        for event in self.events:
            if samples >= self.total_samples or self._due(event.every_samples, samples):
                with self.watchdog.slow(event.what), self.engine.averaged(self.main_average):
                    metrics = event.run(samples)
                self.monitor.log(samples, metrics)
                self.checkpoints.store.record_metrics(samples, metrics)
                self.ledger.charge("evaluation")

    def _due(self, every_samples: int, samples: int) -> bool:
        """Whether the step that ended at `samples` passed a multiple of every_samples."""
        return samples // every_samples > (samples - self.global_batch) // every_samples

    def _log(self, clock: Clock) -> None:
        self.still_ours()
        speed = self.timer.metrics()
        metrics: dict[str, float | str] = {
            **self._means(),
            "train/learning_rate": self.learning_rate(max(0, clock.samples - self.global_batch // 2)),
            **self.epochs(clock.position),
            "data/bad_samples": len(self.bad_samples),
            "faults/skipped_steps": self.divergence.num_skipped,
            **speed,
            "memory/peak_gib": peak_memory_gib(),
            **self.host.metrics(),
        }
        if speed:
            step_time_s = speed["speed/step_time_s"]
            report = self.stragglers.report(step_time_s, step_time_s * speed["speed/data_wait_share"])
            metrics.update(report.metrics)
            if report.warning is not None:
                self._warn(report.warning)
            if self.mfu is not None:
                metrics["speed/mfu"] = self.mfu(speed["speed/samples_per_s"])
        self.ledger.write(clock.samples)
        self.alerts.check_row(clock.samples, speed.get("speed/step_time_s"))
        self.monitor.log(clock.samples, {**metrics, **self.ledger.metrics()})

    def _means(self) -> dict[str, float]:
        """Of the steps since the last row, if any was taken."""
        losses, norms, self.losses, self.norms = self.losses, self.norms, [], []
        if not losses:
            return {}
        return {"train/loss": math.fsum(losses) / len(losses), "train/grad_norm": math.fsum(norms) / len(norms)}

    def _finish(self, clock: Clock, stopped: bool) -> None:
        if stopped:
            self.ledger.event("stop_requested", clock.samples, signal=self.stop.signal_name or "at another rank")
        self.profiler.close()
        with self.watchdog.slow("the last save"):
            self._report(clock.samples, self.checkpoints.store.wait())
            if self.snapshots is not None:
                self.snapshots.store.wait()
        self.ledger.charge("checkpoint_stall")
        self.ledger.write(clock.samples)

    def _warn(self, message: str) -> None:
        if self.world.is_main:
            warn(message)
