"""Saving: the checkpoints of a run, and the snapshots of its averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pomscale.base.clock import Clock
from pomscale.engine.protocol import Engine
from pomscale.training.process import Process
from pomscale.training.schedule import Schedule
from pomscale.training.telemetry import Records


class Saved(Protocol):
    """A save that is complete: how long it took in all, and how long training stood still for it."""

    @property
    def stall_s(self) -> float: ...
    @property
    def total_s(self) -> float: ...


class Store(Protocol):
    """The part of checkpoint.store.CheckpointStore that training uses."""

    @property
    def damaged(self) -> Sequence[Any]: ...
    def save(self, samples: int, state: dict[str, Any], meta: dict[str, Any]) -> float: ...
    def poll(self) -> Saved | None: ...
    def wait(self) -> Saved | None: ...
    def newest(self) -> Path | None: ...
    def record_metrics(self, samples: int, metrics: Mapping[str, float | str]) -> None: ...
    def forget_after(self, samples: int) -> None: ...


@dataclass(frozen=True)
class Series:
    """A store, how often the run saves into it, and which part of the engine's state.

    holds(samples): whether the store has a complete save of these samples already. A collective.
    """

    store: Store
    every_samples: int
    part: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state
    holds: Callable[[int], bool] = lambda samples: False


@dataclass
class Saver:
    """Saves checkpoints, from which the run is resumed, and snapshots, from which `pomscale ema` makes averages.

    snapshots: None where the recipe asks for none. meta: what a save holds beside its tensors and the clock.
    """

    engine: Engine
    checkpoints: Series
    snapshots: Series | None
    meta: Callable[[], dict[str, Any]]
    schedule: Schedule
    process: Process
    records: Records
    _saved_at: int = field(default=0, init=False)  # samples of the checkpoint that was written or loaded last

    def begin_at(self, samples: int) -> None:
        """Continue from the checkpoint at `samples`, and delete the snapshots beyond it. A collective."""
        self._saved_at = samples
        if self.snapshots is not None:
            self.snapshots.store.wait()
            self.snapshots.store.forget_after(samples)

    def poll(self, samples: int) -> None:
        """Log the checkpoint that has become complete since the last call, or raise the error of its save."""
        self._log(samples, self.checkpoints.store.poll())

    def save_checkpoint(self, clock: Clock, *, last: bool) -> None:
        """Save a checkpoint if one is due after a step, or if it is the last one, unless it is there already."""
        is_due = last or self.schedule.is_due(self.checkpoints.every_samples, clock)
        if is_due and clock.samples != self._saved_at:
            self._save(clock, self.checkpoints)
            self._saved_at = clock.samples

    def save_snapshot(self, clock: Clock) -> None:
        """Save a snapshot if one is due, and at the end of the run, where most averages are wanted. A collective."""
        snapshots, samples = self.snapshots, clock.samples
        if snapshots is None:
            return
        is_due = self.schedule.is_over(samples) or self.schedule.is_due(snapshots.every_samples, clock)
        if is_due and not snapshots.holds(samples):
            self._save(clock, snapshots)

    def newest(self, samples: int) -> Path | None:
        """Return the newest checkpoint that is not damaged; None without one. A collective.

        Damaged ones are set aside by the store and recorded, at the clock of now, `samples`.
        """
        store = self.checkpoints.store
        store.wait()
        num_damaged = len(store.damaged)
        latest = store.newest()
        for damaged in store.damaged[num_damaged:]:
            self.records.ledger.event("damaged_checkpoint", samples, reason=damaged.reason)
        return latest

    def finish(self, samples: int) -> None:
        """Wait until all that was saved is complete."""
        with self.process.watchdog.slow("the last save"):
            self._log(samples, self.checkpoints.store.wait())
            if self.snapshots is not None:
                self.snapshots.store.wait()
        self.records.ledger.charge("checkpoint_stall")

    def finish_after_error(self) -> None:
        """Wait for the checkpoint under way: whatever has failed since, it was good when its save began."""
        with self.process.watchdog.slow("saving"):
            self.checkpoints.store.wait()

    def _save(self, clock: Clock, series: Series) -> None:
        meta = {**clock.dump(), **self.meta()}
        with self.process.watchdog.slow("saving"):
            series.store.save(clock.samples, series.part(self.engine.state_dict()), meta)
        self.records.ledger.charge("checkpoint_stall")

    def _log(self, samples: int, saved: Saved | None) -> None:
        if saved is not None:
            row: dict[str, float | str] = {"checkpoint/stall_s": saved.stall_s, "checkpoint/total_s": saved.total_s}
            self.records.monitor.log(samples, row)
