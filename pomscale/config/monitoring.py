"""How a run is watched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pomscale.config.section import Fraction, PositiveFloat, Section


class WandbConfig(Section):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "pomscale"
    entity: str | None = None
    group: str | None = Field(None, description="Runs of one experiment; null = the run's own name.")
    tags: list[str] = Field([], description="Labels of the run in wandb.")


class AlertsConfig(Section):
    """When people are told, through wandb, on the console and in events.jsonl.

    Of losses and gradients that are not finite, of rollbacks and of restarts they always are.
    """

    min_goodput: Fraction | None = Field(
        0.5,
        description="Least share of the wall time, that between starts and in the queue left out, that went into steps "
        "that count; null = never.",
    )
    goodput_after_s: PositiveFloat = Field(3600.0, description="So much wall time before goodput is judged.")
    stall_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        3.0, description="Steps so many times slower than the median row, for a minute and two rows; null = never."
    )


class MonitoringConfig(Section):
    every_samples: PositiveInt = Field(8192, description="Metrics are averaged and written this often.")
    wandb: WandbConfig = WandbConfig()
    alerts: AlertsConfig = AlertsConfig()
