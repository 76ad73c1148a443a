"""The collaborators of the trainer on one rank without a process group: real ones, over a store and an engine of lists.

Everything that the store, the engine and the ledger are asked for is in one list, `Desk.happened`, in its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pomscale.config.engine import EmaConfig, FaultsConfig, ScheduleConfig
from pomscale.config.monitoring import AlertsConfig
from pomscale.data.bad_samples import BadSampleList
from pomscale.distributed.stragglers import Stragglers
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World
from pomscale.engine.divergence import Divergence
from pomscale.monitoring.alerts import Alerts
from pomscale.monitoring.monitor import Monitor
from pomscale.monitoring.profiler import ProfileWindow
from pomscale.runs.ledger import Ledger
from pomscale.training.process import Process
from pomscale.training.recovery import Recovery
from pomscale.training.saving import Saver, Series
from pomscale.training.schedule import Schedule
from pomscale.training.telemetry import Records, Telemetry

BATCH = 8


class Alone(World):
    """A world of one rank whose collectives need no process group."""

    def sum(self, values: Sequence[float | torch.Tensor]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: object) -> list[object]:
        return [value]


class ListStore:
    """A checkpoint store that keeps the meta of each save in a list. damage: reasons that `newest` meets first."""

    def __init__(self, name: str, happened: list[Any]) -> None:
        self.name = name
        self.happened = happened
        self.metas: list[dict[str, Any]] = []
        self.damaged: list[Any] = []
        self.damage: list[str] = []

    def save(self, samples: int, state: dict[str, Any], meta: dict[str, Any]) -> float:
        self.happened.append((f"save {self.name}", samples))
        self.metas.append(meta)
        return 0.0

    def poll(self) -> SimpleNamespace | None:
        return None

    def wait(self) -> SimpleNamespace | None:
        self.happened.append((f"wait {self.name}",))
        return SimpleNamespace(stall_s=0.5, total_s=2.0) if self.metas else None

    def newest(self) -> Path | None:
        while self.damage:
            self.metas.pop()
            self.damaged.append(SimpleNamespace(reason=self.damage.pop()))
        return Path(f"samples-{self.metas[-1]['samples']}") if self.metas else None

    def record_metrics(self, samples: int, metrics: Any) -> None:
        self.happened.append(("record metrics", samples))

    def forget_after(self, samples: int) -> None:
        self.happened.append((f"forget {self.name} after", samples))


class ListEngine:
    """An engine whose steps have the given losses and norms."""

    def __init__(self, happened: list[Any], figures: Sequence[tuple[float, float]] = ()) -> None:
        self.happened = happened
        self.figures = iter(figures)

    def forward_backward(self, micro_batches: Any, loss: Any) -> torch.Tensor:
        value, self.norm = next(self.figures)
        return torch.tensor(value)

    def step(self, learning_rate: float, ema_weights: Any) -> float:
        self.happened.append(("step", learning_rate))
        return self.norm

    def state_dict(self) -> dict[str, Any]:
        return {"model": {}, "ema": {}}

    def replicas(self) -> None:
        self.happened.append(("compare replicas",))

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        self.happened.append(("averaged", average))
        yield


class ListLedger(Ledger):
    """A ledger that writes into a list instead of a folder."""

    def __init__(self, happened: list[Any]) -> None:
        super().__init__(None, 1, 0)
        self.happened = happened

    def charge(self, kind: str) -> None:
        self.happened.append(("charge", kind))

    def write(self, samples: int) -> None:
        self.happened.append(("write", samples))

    def event(self, name: str, samples: int, **details: Any) -> None:
        self.happened.append((name, samples, details))


class RowSink:
    """A sink that keeps rows and the titles of alerts."""

    name, if_cut_off = "rows", ""
    is_slow_to_close = False

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[str] = []

    def log(self, samples: int, metrics: dict[str, Any], unix_s: float) -> None:
        self.rows.append({"samples": samples, **metrics})

    def log_image(self, *arguments: Any) -> None: ...

    log_video = log_image

    def alert(self, samples: int, title: str, text: str, level: str) -> None:
        self.alerts.append(title)

    def close(self, failed: bool = False) -> None: ...


class Desk:
    """The collaborators of one run of 10 steps: checkpoints every 4 steps, snapshots every 3, rows every 2."""

    def __init__(
        self, folder: Path, *, max_non_finite: int = 2, max_rollbacks: int = 1, figures: Sequence[Any] = ()
    ) -> None:
        self.happened: list[Any] = []
        self.sink = RowSink()
        monitor, ledger = Monitor([self.sink]), ListLedger(self.happened)
        self.records = Records(monitor, ledger, Alerts(AlertsConfig(min_goodput=None), monitor, ledger))
        self.stop = SimpleNamespace(requested=False, signal_name=None)
        self.start = SimpleNamespace(number=1, check=lambda: None)
        device = torch.device("cpu")
        self.process = Process(
            Alone(0, 1, device),
            self.start,  # type: ignore[arg-type]
            self.stop,  # type: ignore[arg-type]
            Watchdog(None, 1.0, folder / "stacks.txt", print),
        )
        self.schedule = Schedule(
            total_samples=10 * BATCH,
            global_batch=BATCH,
            peak=1.0,
            shape=ScheduleConfig(warmup_samples=0),
            ema=EmaConfig(),
        )
        self.engine: Any = ListEngine(self.happened, figures)
        self.checkpoints, self.snapshots = (ListStore(name, self.happened) for name in ("checkpoint", "snapshot"))
        faults = {"max_non_finite": max_non_finite, "max_rollbacks": max_rollbacks, "loss_spike": {"num_steps": 16}}
        self.divergence = Divergence(FaultsConfig.model_validate(faults))
        self.saver = Saver(
            self.engine,
            Series(self.checkpoints, 4 * BATCH),
            Series(self.snapshots, 3 * BATCH, part=lambda state: {"ema": state["ema"]}),
            lambda: {"divergence": self.divergence.dump()},
            self.schedule,
            self.process,
            self.records,
        )
        self.telemetry = Telemetry(
            self.process,
            self.records,
            ProfileWindow(None, folder, 0, device),
            Stragglers(self.process.world),
            2 * BATCH,
            lambda clock: {"data/epoch": clock.position / 100},
            lambda samples_per_s: samples_per_s / 1000,
        )
        self.recovery = Recovery(
            self.divergence,
            BadSampleList(1),
            self._restore,
            self.saver,
            self.telemetry,
            self.process,
            self.records,
        )

    def _restore(self, checkpoint: Path) -> dict[str, Any]:
        return next(meta for meta in self.checkpoints.metas if f"samples-{meta['samples']}" == str(checkpoint))

    def of(self, *names: str) -> list[Any]:
        """The events of these names, in their order."""
        return [each for each in self.happened if each[0] in names]

    def rows(self) -> list[dict[str, Any]]:
        self.records.monitor.close()
        return self.sink.rows
