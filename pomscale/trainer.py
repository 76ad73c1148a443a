"""The training loop, and nothing else. Everything it uses is built in train.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from pomscale.distributed.stop import StopRequest
from pomscale.distributed.world import World
from pomscale.engine.protocol import Engine
from pomscale.errors import PomscaleError
from pomscale.monitoring.host import HostStats, peak_memory_gib
from pomscale.monitoring.monitor import Monitor
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.monitoring.throughput import StepTimer


class Checkpoints(Protocol):
    """What the loop asks of a checkpoint store; see checkpoint.store."""

    def save(self, samples: int, state: dict[str, Any], meta: dict[str, Any]) -> None: ...
    def poll(self) -> None: ...
    def wait(self) -> None: ...


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

    every_samples: int
    run: Callable[[int], dict[str, float | str]]


@dataclass
class Trainer:
    """See train.py for what is passed in. The clock of everything is samples seen."""

    engine: Engine
    batches: Iterator[list[Any]]  # the micro-batches of this rank, one list per step; `bad`: those it could not read
    loss: Callable[[nn.Module, Any], Tensor]
    learning_rate: Callable[[int], float]
    ema_weight: Callable[[int], float]
    checkpoints: Checkpoints
    checkpoint_meta: dict[str, Any]
    bad_samples: BadSamples
    epochs: Callable[[int], dict[str, float | str]]  # samples seen -> how often each dataset was gone through, to log
    events: list[Event]
    monitor: Monitor
    host: HostStats
    mfu: Callable[[float], float] | None  # samples/s -> model FLOPs utilisation, where the device's peak is known
    profiler: ProfileWindow
    world: World
    stop: StopRequest
    global_batch: int
    total_samples: int
    log_every_samples: int
    checkpoint_every_samples: int
    timer: StepTimer = field(default_factory=StepTimer)

    def run(self, samples: int) -> int:
        """Train from `samples` to the end or to a stop that was asked for; returns the samples seen, all saved."""
        try:
            return self._train(samples)
        except Exception:
            # Whatever has failed, here or (then it is torch's own error) at another rank: the save before it is good.
            self.checkpoints.wait()
            raise

    def _train(self, samples: int) -> int:
        losses: list[float] = []
        norms: list[float] = []
        stopping = False
        if samples:
            self._run_events(samples)  # those of the last save, which a stop or a kill may have cut off
        while samples < self.total_samples and not stopping:
            self.profiler.step(samples)
            with self.timer.data_wait():
                micro_batches = next(self.batches)
            share = self.engine.forward_backward(micro_batches, self.loss)
            bad = [sample for batch in micro_batches for sample in batch.bad]
            # One collective per step carries the loss, the ranks' agreement to stop, and word of bad samples.
            loss, stop_votes, num_bad = self.world.sum([share, float(self.stop.requested), float(len(bad))])
            if num_bad:
                self._note_bad(samples, bad)
            # In the middle of the step: at its start a warm-up would give 0, at its end a cooldown would.
            learning_rate = self.learning_rate(samples + self.global_batch // 2)
            norm = self.engine.step(learning_rate, self.ema_weight(samples + self.global_batch))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._diverged(samples, loss, norm)
            samples += self.global_batch
            stopping = stop_votes > 0 and samples < self.total_samples
            last = stopping or samples >= self.total_samples
            losses.append(loss)
            norms.append(norm)
            self.timer.count_step(self.global_batch)
            if last or self._due(self.log_every_samples, samples):
                self._log(samples, losses, norms, learning_rate)
                losses, norms = [], []
            with self.timer.paused():
                self.checkpoints.poll()
                if last or self._due(self.checkpoint_every_samples, samples):
                    meta = {"samples": samples, "bad_samples": self.bad_samples.known, **self.checkpoint_meta}
                    self.checkpoints.save(samples, self.engine.state_dict(), meta)
                # After the save, so that what fails in them costs no training. A run that is asked to stop has
                # seconds left: its events happen after the restart.
                if not stopping:
                    self._run_events(samples)
        self.profiler.close()
        self.checkpoints.wait()
        return samples

    def _note_bad(self, samples: int, bad: list[Any]) -> None:
        """A collective: every rank hears of every bad sample, and all end the run together if there are too many."""
        met: list[Any] = self.world.gather(bad)
        self.bad_samples.add(samples, itertools.chain.from_iterable(met))

    def _run_events(self, samples: int) -> None:
        for event in self.events:
            if samples >= self.total_samples or self._due(event.every_samples, samples):
                with self.engine.ema_weights():
                    metrics = event.run(samples)
                if metrics:
                    self.monitor.log(samples, metrics)

    def _due(self, every_samples: int, samples: int) -> bool:
        """Whether the step that ended at `samples` passed a multiple of every_samples."""
        return samples // every_samples > (samples - self.global_batch) // every_samples

    def _log(self, samples: int, losses: list[float], norms: list[float], learning_rate: float) -> None:
        speed = self.timer.metrics()
        metrics: dict[str, float | str] = {
            "train/loss": math.fsum(losses) / len(losses),
            "train/grad_norm": math.fsum(norms) / len(norms),
            "train/learning_rate": learning_rate,
            **self.epochs(samples),
            "data/bad_samples": len(self.bad_samples),
            **speed,
            "memory/peak_gib": peak_memory_gib(),
            **self.host.metrics(),
        }
        if self.mfu is not None:
            metrics["speed/mfu"] = self.mfu(speed["speed/samples_per_s"])
        self.monitor.log(samples, metrics)

    def _diverged(self, samples: int, loss: float, norm: float) -> PomscaleError:
        first, end = samples, samples + self.global_batch
        return PomscaleError(
            f"loss {loss} and gradient norm {norm} at global positions {first} to {end - 1}: not finite, so the step "
            "was not taken and the last checkpoint is good. Check the data (pomscale data verify), lower "
            "optimizer.lr, or train in fp32, then run the same command again."
        )
